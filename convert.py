"""What is in a checkpoint, and any published layout -> one llava-hf folder that transformers, vLLM
and qilin-min load, or the GGUF files of llama.cpp and ollama.

    python convert.py info PATH
        layout, sizes, dtype, vocabulary, memory to run it, what an adapter changes; headers only
    python convert.py SRC DST
        original LLaVA or Qilin release, llava-hf of any age, a train.py --out folder; a linear
        projector of an older export, which vLLM refuses, leaves in the form that it runs
    python convert.py DST --llm DIR --vision DIR --projector FILE
        from parts; beside SRC, a part given so takes the place of SRC's own
    python convert.py ADAPTER DST [--base DIR]
        a peft adapter, also one of LLaVA's LoRA training, merged into the base that it names, which
        is looked for beside it, here and in weights/, or into the model or LLaMA folder given
    python convert.py SRC DST --dtype bfloat16
        half the size (default: as on disk, float32 where parts differ)
    python convert.py SRC DST --quantize int4
        the decoder blocks' linear layers in 4 bits, a third of float16's size, for sample.py,
        serve.py and evaluate.py, which else quantise anew at every start
    python convert.py SRC DST --gguf q8_0
        for llama.cpp: DST/DST-q8_0.gguf, DST/mmproj-DST-f16.gguf and a Modelfile for ollama; f32,
        f16, bf16, q8_0 or q4_0, the picture half always f16 (needs `pip install gguf==0.19.0`)

DST gets safetensors shards of at most 5 GB, config.json, generation_config.json, tokenizer,
processor and chat template, and a README.md to be completed. Weights of one dtype are mapped from
disk, not held: a 13B model converts in the memory of one shard; what an adapter changes is held.
DST appears when it is whole and was read again: every byte of its tensors, its configuration, its
tokenizer (tokenizer.json only where it gives the ids of tokenizer.model). An interrupted run can be
repeated.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.files import model_folder, run_cli
from model_io.adapters import base_folder, language_folder
from model_io.card import Origin, bases_of, projector_name
from model_io.export import INT4_LIMITS, check_exportable, export_limits, save_qilin
from model_io.gguf import GGUF_KINDS, check_gguf, save_gguf
from model_io.info import counted, human, info_lines
from model_io.int4_files import holds_int4
from model_io.load import Checkpoint, load_qilin, read_checkpoint
from model_io.tokens import Tokenizer
from model_io.written import check_place
from qilin_min import WeightFiles, check_finite, part_of


def check_is_no_source(dst: Path, sources: list[str | Path]) -> None:
    """ValueError where DST is there and is one of the folders that are read."""
    if not dst.exists():
        return
    for path in sources:
        place = model_folder(path)
        # a file is read where it lies
        folder = place.parent if place.is_file() else place
        if dst.resolve() in (Path(path).resolve(), folder.resolve()):
            raise ValueError(f"{dst} is a source as well: give another name")


def stored_dtype(sources: list[tuple[WeightFiles, set[str]]]) -> str:
    """The dtype that all weights have on disk, or float32, which holds all others exactly."""
    dtypes = set()
    for files, parts in sources:
        dtypes |= {files.dtype(name) for name in files.tensors if part_of(name) in parts}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def find_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of the language model's folder, or None, which stderr tells."""
    try:
        return Tokenizer(folder)
    except FileNotFoundError as error:
        print(
            f"convert.py: {error}; DST is written without tokenizer and chat template",
            file=sys.stderr,
        )
        return None


@dataclass(frozen=True)
class Given:
    """What a model is to be made of: SRC and the parts beside it."""

    src: str | None
    llm: str | None
    vision: str | None
    projector: str | None
    base: str | None

    def check_apart(self, dst: Path, checkpoint: Checkpoint) -> None:
        """ValueError where DST is one of what is read."""
        named = [path for path in (self.src, self.llm, self.vision) if path is not None]
        # a tower, or an adapter's base, may have been found by its name
        found = [files.path for files, _ in checkpoint.sources]
        merged_into = self.merged_into()
        if merged_into is not None:
            found.append(merged_into)
        check_is_no_source(dst, named + found)

    def merged_into(self) -> Path | None:
        """The base of SRC, where that is an adapter."""
        return base_folder(self.src, self.llm, self.base)

    def language_folder(self) -> Path:
        """Where the tokenizer lies."""
        return language_folder(self.src, self.llm, self.base)

    def parts(self) -> dict[str, Any]:
        """What read_checkpoint and load_qilin take, by their names for it."""
        return {
            "model": self.src,
            "llm": self.llm,
            "vision": self.vision,
            "projector": self.projector,
            "base": self.base,
        }


def check_is_float(given: Given, checkpoint: Checkpoint) -> None:
    """ValueError where SRC is in 4 bits, which have lost what DST should hold."""
    if holds_int4(checkpoint.sources):
        path = given.src or given.llm
        raise ValueError(f"{path} is in 4 bits already: convert the model that it was made from")


def convert(given: Given, dst: Path, dtype: str | None, quantize: str | None) -> None:
    """Load without copying, write DST."""
    checkpoint = read_checkpoint(**given.parts())
    check_is_float(given, checkpoint)
    check_exportable(checkpoint.config.projector_type)
    given.check_apart(dst, checkpoint)
    check_place(dst)
    stored = stored_dtype(checkpoint.sources)
    found = given.merged_into()
    # what is merged is rounded once, to what DST holds; what is not is mapped as it lies on disk
    loaded = stored if found is None else dtype or stored
    model = load_qilin(**given.parts(), dtype=getattr(torch, loaded), quantize=quantize)
    dtype = dtype or stored
    check_finite(model, getattr(torch, dtype))

    folder = given.language_folder()
    tokenizer = find_tokenizer(folder)
    origin = Origin(
        how="converted from what is named below",
        bases=bases_of(found, folder, given.src, given.vision),
        projector=projector_name(given.projector),
    )
    save_qilin(model, tokenizer, dst, getattr(torch, dtype), origin)

    kind = f"{quantize} and {dtype}" if quantize else dtype
    size = sum(file.stat().st_size for file in dst.iterdir())
    n_shards = len(list(dst.glob("*.safetensors")))
    print(
        f"{dst}: {human(size)} in {kind}, {counted(n_shards, 'shard')}, "
        f"{model.config.projector_type} projector; complete its README.md before you share it"
    )
    limits = INT4_LIMITS if quantize else export_limits(model.config)
    if limits is not None:
        print(f"{dst}: {limits}")


def convert_to_gguf(given: Given, dst: Path, kind: str) -> None:
    """Load without copying, write the files of llama.cpp."""
    checkpoint = read_checkpoint(**given.parts())
    check_is_float(given, checkpoint)
    # a GGUF file holds its vocabulary: without a tokenizer there is none
    tokenizer = Tokenizer(given.language_folder())
    check_gguf(checkpoint.config, tokenizer, kind, dst)
    given.check_apart(dst, checkpoint)
    # what is merged is rounded once, to what DST holds
    is_merged = given.merged_into() is not None
    loaded = "float32" if is_merged else stored_dtype(checkpoint.sources)
    model = load_qilin(**given.parts(), dtype=getattr(torch, loaded))
    remarks = save_gguf(model, tokenizer, dst, kind)
    for file in sorted(dst.glob("*.gguf")):
        print(f"{file}: {human(file.stat().st_size)}")
    for line in remarks:
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="info PATH | SRC DST | DST", help="see above")
    add("--llm", metavar="DIR", help="LLaMA folder")
    add("--vision", metavar="DIR", help="CLIP folder")
    add("--projector", metavar="FILE", help="projector file")
    add("--base", metavar="DIR", help="what SRC, an adapter, is merged into")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights in DST")
    add("--gguf", choices=GGUF_KINDS, help="files for llama.cpp, with weights of this kind")
    add(
        "--quantize",
        choices=("int4",),
        help="keep the decoder blocks' linear layers in 4 bits; --dtype is of all others",
    )
    args = parser.parse_intermixed_args()

    n_paths = len(args.paths)
    if n_paths == 2 and args.paths[0] == "info":
        for line in info_lines(model_folder(args.paths[1]), args.base):
            print(line)
        return
    has_parts = args.llm and args.vision and args.projector
    if n_paths > 2 or (n_paths == 1 and not has_parts):
        raise ValueError("give `info PATH`, `SRC DST`, or DST with --llm, --vision and --projector")
    given = Given(
        src=args.paths[0] if n_paths == 2 else None,
        llm=args.llm,
        vision=args.vision,
        projector=args.projector,
        base=args.base,
    )
    dst = Path(args.paths[-1])
    if args.gguf:
        if args.quantize:
            raise ValueError("--gguf names the kind of its own: --gguf q4_0 is in 4 bits")
        if args.dtype:
            raise ValueError("--dtype is of a llava-hf folder; --gguf names the kind of its own")
        convert_to_gguf(given, dst, args.gguf)
        return
    convert(given, dst, args.dtype, args.quantize)


if __name__ == "__main__":
    run_cli(main)
