"""What is in a checkpoint, and any published layout -> one llava-hf folder that transformers, vLLM and qilin-min load.

    python convert.py info PATH                                       layout, sizes, dtype, vocabulary, memory to run it; reads headers only
    python convert.py SRC DST                                         original LLaVA or Qilin release, llava-hf of any age, a train.py --out folder
    python convert.py DST --llm DIR --vision DIR --projector FILE     from parts; beside SRC, a part given so takes the place of SRC's own
    python convert.py SRC DST --dtype bfloat16                        half the size (default: as on disk, float32 where parts differ)

DST gets safetensors shards of at most 5 GB, config.json, generation_config.json, tokenizer, processor and chat template, and a README.md to be completed.
Weights of one dtype are mapped from disk, not held: a 13B model converts in the memory of one shard. DST appears when it is whole; an interrupted run can be repeated.
"""

import argparse
import sys
from pathlib import Path

import torch

from common.files import check_replaceable, model_folder, run_cli
from model_io.export import save_qilin
from model_io.load import load_qilin, read_checkpoint
from model_io.tokens import Tokenizer
from model_io.weights import weight_files
from qilin_min import (
    DTYPES,
    PARTS,
    Qilin,
    account,
    check_finite,
    folder_config,
    part_of,
    projector_type_of,
    text_config,
    vision_config,
)

LAYOUTS = (  # the beginning of a tensor's name in the file -> layout; the first that any name has
    ("base_model.model.", "saved through peft"),
    ("model.vision_tower.vision_tower.", "original LLaVA / Qilin release, vision tower inside"),
    ("model.vision_tower.vision_model.", "llava-hf, transformers 4.52 and later"),
    ("model.vision_tower.", "llava-hf, transformers 5"),
    ("language_model.model.", "llava-hf, transformers up to 4.51 (what qilin-min writes)"),
    ("model.mm_projector.", "original LLaVA / Qilin release, vision tower elsewhere"),
    ("mm_projector.", "a projector alone"),
    ("model.layers.", "Hugging Face LLaMA"),
    ("text_model.", "Hugging Face CLIP with its text tower"),
    ("vision_model.", "Hugging Face CLIP vision tower"),
    ("embeddings.", "Hugging Face CLIP vision tower, transformers 5"),
)


def layout_of(files, names):
    """The layout by the names inside; `names` as they stand in the files."""
    if all(part_of(name) == "mm_projector" for name in files.tensors):
        return "a projector alone (stage 1)"
    return next(
        (layout for start, layout in LAYOUTS if any(name.startswith(start) for name in names)),
        "unknown",
    )


def human(n_bytes):
    """Bytes as GiB, or MiB where they are few."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def memory_lines(config, total):
    """What running a whole model of `total` parameters takes: weights, and keys and values of 2048 positions."""
    text = config.text
    in_blocks = (
        text.num_hidden_layers
        * text.hidden_size
        * (
            2 * text.num_attention_heads * text.head_dim
            + 2 * text.num_key_value_heads * text.head_dim
            + 3 * text.intermediate_size
        )
    )
    cache = (
        2
        * text.num_hidden_layers
        * text.num_key_value_heads
        * text.head_dim
        * min(2048, text.max_position_embeddings)
    )
    needs = {
        "float32": (4 * total, 4),
        "bfloat16": (2 * total, 2),
        "int8": (2 * (total - in_blocks) + in_blocks, 2),
        "int4": (2 * (total - in_blocks) + in_blocks * 17 / 32, 2),
    }
    return [
        f"    {name:9} {human(weights):>10} weights + {human(cache * size)} keys and values"
        for name, (weights, size) in needs.items()
    ]


def info(path):
    """Print what a folder or file holds. ValueError where it could not be loaded, as for loading itself."""
    path = model_folder(path)
    files = weight_files(path)
    stored = [entry.name for entry in files.tensors.values()]
    dtypes = sorted({files.dtype(name) for name in files.tensors})
    n_params = {part: 0 for part in PARTS}
    for name in files.tensors:
        n_params[part_of(name)] += torch.Size(files.shape(name)).numel()
    n_files = len({entry.file for entry in files.tensors.values()})
    print(f"{path}")
    print(f"  layout      {layout_of(files, [*stored, *files.ignored])}")
    print(
        f"  tensors     {len(stored)} in {n_files} file{'s' * (n_files > 1)}, {len(files.ignored)} ignorable, {len(files.unknown)} unknown; {', '.join(dtypes)}"
    )
    for part, n in n_params.items():
        print(f"  {part:11} {n:>16,} parameters" if n else f"  {part:11} none inside")
    raw, where = (
        folder_config(path)
        if (path if path.is_dir() else path.parent).joinpath("config.json").is_file()
        else (None, None)
    )
    if n_params["llm"]:
        if raw is None:
            raise ValueError(
                f"{path}: no config.json beside it: it tells heads, norms and rotations, which no tensor shows"
            )
        text = text_config(raw.get("text_config", raw), where)
        print(
            f"  language    {text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads ({text.num_key_value_heads} key-value), "
            f"ffn {text.intermediate_size}, vocabulary {text.vocab_size}, {text.max_position_embeddings} positions, theta {text.rope_theta:g}"
        )
        folder = path if path.is_dir() else path.parent
        if (folder / "tokenizer.model").is_file():
            print(f"  tokenizer   tokenizer.model, {Tokenizer(folder).vocab_size} pieces")
        else:
            print(
                "  tokenizer   none: sample.py and train.py need a tokenizer.model beside the weights"
            )
    if n_params["vision_tower"] and not n_params["llm"] and raw is not None:
        tower = vision_config(raw, where)
        print(
            f"  vision      {tower.num_hidden_layers} layers, width {tower.hidden_size}, {tower.image_size} pixels in patches of {tower.patch_size}"
        )
    if n_params["llm"] and (n_params["mm_projector"] or n_params["vision_tower"]):
        checkpoint = read_checkpoint(path)
        config = checkpoint.config
        with torch.device("meta"):
            model = Qilin(config)
        _, line = account(model, checkpoint.sources, checkpoint.is_fresh)
        tower, outside = (
            config.vision,
            [str(f.path) for f, parts in checkpoint.sources if f.path != path],
        )
        print(
            f"  vision      {tower.num_hidden_layers} layers, {len(model.vision_tower.encoder.layers[: model.vision_tower.n_computed])} computed, width {tower.hidden_size}, "
            f"{tower.image_size} pixels in patches of {tower.patch_size}: {config.n_image_tokens} tokens a picture{', from ' + outside[0] if outside else ''}"
        )
        print(f"  projector   {config.projector_type}")
        print(f"  complete    {line}")
        print("  memory to run it")
        print("\n".join(memory_lines(config, sum(p.numel() for p in model.parameters()))))
    elif files.unknown:
        raise ValueError(
            f"{path}: tensors that this model has no place for: {', '.join(sorted(files.unknown)[:10])}"
        )
    elif not n_params["llm"] and not n_params["vision_tower"]:
        weights = [files.shape(name) for name in sorted(files.tensors) if name.endswith("weight")]
        print(
            f"  projector   {projector_type_of(files, raw or {})}: {' -> '.join(map(str, [weights[0][1], *(w[0] for w in weights)]))}"
        )
    else:
        print("  one part of a model: give it as --llm or --vision")


def convert(args):
    """Load without copying, write DST."""
    sources = read_checkpoint(
        args.src, llm=args.llm, vision=args.vision, projector=args.projector
    ).sources
    check_replaceable(args.dst, "config.json")
    for path in (args.src, args.llm, args.vision):
        if (
            path is not None
            and args.dst.exists()
            and args.dst.resolve() in (Path(path).resolve(), model_folder(path).resolve())
        ):
            raise ValueError(f"{args.dst} is a source as well: give another name")
    dtypes = {
        files.dtype(name)
        for files, parts in sources
        for name in files.tensors
        if part_of(name) in parts
    }
    stored = dtypes.pop() if len(dtypes) == 1 else "float32"  # which holds all others exactly
    if stored not in DTYPES.values():
        raise ValueError(f"weights of type {stored} are not implemented here")
    model, dtype = (
        load_qilin(
            args.src,
            llm=args.llm,
            vision=args.vision,
            projector=args.projector,
            dtype=getattr(torch, stored),
        ),
        args.dtype or stored,
    )
    check_finite(model, getattr(torch, dtype))
    folder = args.llm or args.src
    try:
        tokenizer = Tokenizer(folder)
    except FileNotFoundError as error:
        tokenizer = None
        print(
            f"convert.py: {error}; DST is written without tokenizer and chat template",
            file=sys.stderr,
        )
    names = [
        Path(path).name
        for path in (args.src, args.llm, args.vision, args.projector)
        if path is not None
    ]
    save_qilin(model, tokenizer, args.dst, getattr(torch, dtype), made_from=", ".join(names))
    size = sum(f.stat().st_size for f in args.dst.iterdir())
    n_shards = len(list(args.dst.glob("*.safetensors")))
    print(
        f"{args.dst}: {human(size)} in {dtype}, {n_shards} shard{'s' * (n_shards > 1)}, {model.config.projector_type} projector; complete its README.md before you share it"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", metavar="info PATH | SRC DST | DST", help="see above")
    parser.add_argument("--llm", metavar="DIR", help="LLaMA folder")
    parser.add_argument("--vision", metavar="DIR", help="CLIP folder")
    parser.add_argument("--projector", metavar="FILE", help="projector file")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights in DST"
    )
    args = parser.parse_intermixed_args()
    if args.paths[0] == "info" and len(args.paths) == 2:
        return info(args.paths[1])
    if len(args.paths) > 2 or (
        len(args.paths) == 1 and not (args.llm and args.vision and args.projector)
    ):
        raise ValueError("give `info PATH`, `SRC DST`, or DST with --llm, --vision and --projector")
    *src, args.dst = args.paths
    args.src, args.dst = (src or [None])[0], Path(args.dst)
    convert(args)


if __name__ == "__main__":
    run_cli(main)
