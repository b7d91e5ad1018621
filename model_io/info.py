"""What a folder or file holds, told from headers alone, before anyone waits for its weights.

in: a path of any layout; out: lines of text, or the error that loading it would end in
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from model_io.adapters import adapter_folder, find_base, language_folder, open_adapter
from model_io.export import llava_obstacle, vllm_obstacle
from model_io.foreign import check_tensors_are_plain
from model_io.gguf import gguf_obstacle
from model_io.int4_files import StoredInt4, holds_int4
from model_io.load import empty_model, folder_of, read_checkpoint, read_config
from model_io.processor import check_tower_processor
from model_io.tokenizer_files import fast_tokenizer
from model_io.tokens import Tokenizer
from model_io.weights import FoundWeights, find_weights, named_folder, open_found
from qilin_min import (
    PARTS,
    QilinConfig,
    WeightFiles,
    account,
    check_all_known,
    inner_config,
    named_list,
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


def layout_of(files: WeightFiles) -> str:
    """The layout by the names inside, as they stand in the files."""
    if all(part_of(name) == "mm_projector" for name in files.tensors):
        return "a projector alone (stage 1)"
    stored = [entry.name for entry in files.tensors.values()]
    names = [*stored, *files.ignored]
    for start, layout in LAYOUTS:
        if any(name.startswith(start) for name in names):
            return layout
    return "unknown"


def human(n_bytes: float) -> str:
    """Bytes as GiB, or MiB where they are few."""
    if n_bytes >= 2**30:
        return f"{n_bytes / 2**30:.2f} GiB"
    return f"{n_bytes / 2**20:.1f} MiB"


def counted(n: int, word: str) -> str:
    """How many of what."""
    return f"{n} {word}s" if n > 1 else f"{n} {word}"


def column(name: str, text: str) -> str:
    """A line of info: what, then how much of it."""
    return f"  {name:11} {text}"


def files_lines(found: FoundWeights) -> Iterator[str]:
    """Which files are read, and which look alike and are not."""
    n_files = len(found.files)
    shards = "" if found.files == [found.place] else f", {counted(n_files, 'shard')}"
    yield column("files", found.place.name + shards)
    for name in found.aside:
        yield column("left aside", name)


def tensors_line(files: WeightFiles) -> str:
    """How many tensors in how many files, and in which dtypes."""
    n_files = len({entry.file for entry in files.tensors.values()})
    dtypes = set()
    for name, entry in files.tensors.items():
        dtypes.add("int4" if isinstance(entry.stored, StoredInt4) else files.dtype(name))
    return column(
        "tensors",
        f"{len(files.tensors)} in {counted(n_files, 'file')}, {len(files.ignored)} ignorable, "
        f"{len(files.unknown)} unknown; {', '.join(sorted(dtypes))}",
    )


def count_parameters(files: WeightFiles) -> dict[str, int]:
    """{part of a model: parameters of it in the files}."""
    n_params: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name in files.tensors:
        n_params[part_of(name)] += torch.Size(files.shape(name)).numel()
    return n_params


def language_lines(path: Path, raw: dict, where: Path) -> Iterator[str]:
    """Sizes of the language model by its config.json (`raw`, of `where`), and its tokenizer."""
    text = text_config(inner_config(raw, where), where)
    yield column(
        "language",
        f"{text.num_hidden_layers} layers, width {text.hidden_size}, "
        f"{text.num_attention_heads} heads ({text.num_key_value_heads} key-value), "
        f"ffn {text.intermediate_size}, vocabulary {text.vocab_size}, "
        f"{text.max_position_embeddings} positions, theta {text.rope_theta:g}",
    )
    folder = folder_of(path)
    if (folder / "tokenizer.model").is_file():
        n_pieces = Tokenizer(folder).vocab_size
        yield column("tokenizer", f"tokenizer.model, {n_pieces} pieces")
    else:
        yield column(
            "tokenizer",
            "none: sample.py and train.py need a tokenizer.model beside the weights",
        )


def tower_line(raw: dict, where: Path) -> str:
    """Sizes of a vision tower that lies alone."""
    tower = vision_config(raw, where)
    return column(
        "vision",
        f"{tower.num_hidden_layers} layers, width {tower.hidden_size}, "
        f"{tower.image_size} pixels in patches of {tower.patch_size}",
    )


def widths_of(shapes: list[tuple[int, ...]]) -> str:
    """What goes into a projector and comes out of each of its layers; shapes (out, in) of them."""
    widths = [shapes[0][1], *(shape[0] for shape in shapes)]
    return " -> ".join(map(str, widths))


def projector_line(files: WeightFiles, raw: dict) -> str:
    """The kind and widths of a projector that lies alone. ValueError where it has no layers."""
    shapes = []
    for name in sorted(files.tensors):
        shape = files.shape(name)
        if name.endswith("weight") and len(shape) == 2:
            shapes.append(shape)
    if not shapes:
        names = named_list(files.tensors) or "nothing"
        raise ValueError(f"{files.path}: no weight of a projector's layer in it, but {names}")
    return column("projector", f"{projector_type_of(files, raw)}: {widths_of(shapes)}")


SQUARES = {
    "pad": "padded to a square",
    "crop": "shorter side fitted, the middle cut out",
}


def whole_model_lines(path: Path, base: str | Path | None = None) -> Iterator[str]:
    """What loading a whole model would find, and what it takes to run it. ValueError as loading."""
    checkpoint = read_checkpoint(path, base=base)
    config = checkpoint.config
    model = empty_model(config, torch.float32, None)
    _, accounted = account(model, checkpoint.sources, checkpoint.is_fresh)
    tower = config.vision
    encoder = model.vision_tower.encoder
    n_computed = len(encoder.layers[: model.vision_tower.n_computed])
    outside = [files.path for files, _ in checkpoint.sources if files.path != path]
    origin = f", from {outside[0]}" if outside else ""
    yield column(
        "vision",
        f"{tower.num_hidden_layers} layers, {n_computed} computed, width {tower.hidden_size}, "
        f"{tower.image_size} pixels in patches of {tower.patch_size}: "
        f"{config.n_image_tokens} tokens a picture{origin}",
    )
    yield column("pictures", f"{SQUARES[config.image_mode]} ({checkpoint.mode_reason})")
    layers = [p for p in model.mm_projector.parameters() if p.ndim == 2]
    widths = widths_of([tuple(weight.shape) for weight in layers])
    yield column("projector", f"{config.projector_type}: {widths}")
    yield column("complete", accounted)
    folder = language_folder(path, None, base)
    tokenizer = Tokenizer(folder) if (folder_of(folder) / "tokenizer.model").is_file() else None
    is_int4 = holds_int4(checkpoint.sources)
    if is_int4:
        yield column("opens in", "qilin-min alone; others open what convert.py makes of its source")
    else:
        yield "  what convert.py makes of it opens in"
        yield from opens_lines(config, tokenizer)
    yield "  memory to run it (quantised: numbers of the blocks' linear layers, and all others)"
    for need in memory_needs(config):
        if is_int4 and not need.name.startswith("int4"):
            continue
        yield (
            f"    {need.name:14} {human(need.weights):>10} weights + {human(need.cached)} keys and "
            f"values  {need.remark}"
        )


def opens_lines(config: QilinConfig, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Which programs run what convert.py makes of a model, and why another does not."""
    obstacle = fast_tokenizer(tokenizer).obstacle if tokenizer else None
    transformers = "yes"
    if tokenizer is None:
        transformers = "yes, without a tokenizer: none lies beside the weights"
    elif obstacle:
        transformers = f"yes, texts are cut by sentencepiece: {obstacle}"
    vllm = transformers
    if obstacle:
        vllm = "not tried with a tokenizer that has no tokenizer.json"
    if vllm_obstacle(config):
        vllm = f"no: {vllm_obstacle(config)}"
    if llava_obstacle(config):
        transformers = f"no: {llava_obstacle(config)}"
        vllm = transformers
    reason = gguf_obstacle(config, tokenizer)
    llama_cpp = f"no: {reason}" if reason else "yes, by --gguf"
    answers = {
        "transformers 4.57, 5": transformers,
        "vLLM": vllm,
        "llama.cpp, ollama": llama_cpp,
    }
    for program, answer in answers.items():
        yield f"    {program:21} {answer}"


# what --dtype and --quantize may be: name, both, when they are
RUNS = (
    ("float32", torch.float32, None, "default on most CPUs"),
    ("bfloat16", torch.bfloat16, None, "default on a GPU and on CPUs that are fast in it"),
    ("int8, float32", torch.float32, "int8", "--quantize int8 on a CPU"),
    ("int8, bfloat16", torch.bfloat16, "int8", "--quantize int8 on a GPU"),
    ("int4, float32", torch.float32, "int4", "--quantize int4 on a CPU"),
    ("int4, bfloat16", torch.bfloat16, "int4", "--quantize int4 on a GPU"),
)


@dataclass
class MemoryNeed:
    """Bytes that a model takes once it is loaded, in one of RUNS."""

    name: str
    # parameters, and the scales of quantised ones
    weights: int
    # keys and values of 2048 positions, or of as many as the model has
    cached: int
    remark: str


def memory_needs(config: QilinConfig) -> list[MemoryNeed]:
    """What each of RUNS takes that this model can have: int4 wants an even width."""
    text = config.text
    n_positions = min(2048, text.max_position_embeddings)
    kv_width = text.num_key_value_heads * text.head_dim
    n_cached = 2 * text.num_hidden_layers * kv_width * n_positions
    needs = []
    for name, dtype, quantize, remark in RUNS:
        try:
            model = empty_model(config, dtype, quantize)
        except ValueError:
            continue
        held = [*model.parameters(), *model.buffers()]
        weights = sum(tensor.nbytes for tensor in held)
        needs.append(MemoryNeed(name, weights, n_cached * dtype.itemsize, remark))
    return needs


def adapter_lines(path: Path, given: str | None) -> Iterator[str]:
    """What a peft adapter changes in which base, and whether the two fit. given: --base."""
    adapter = open_adapter(path)
    yield str(path)
    kind = "DoRA" if adapter.settings.get("use_dora") else "LoRA"
    yield column("layout", f"a peft adapter ({kind})")
    is_found = bool(given) or named_folder(adapter.base_name, path) is not None
    base = find_base(path, given, llm=None) if is_found else None
    named = adapter.base_name or "none named"
    yield column("base", f"{named}: {base or 'not found, give --base DIR'}")

    changes = adapter.changes.values()
    n_params = sum(change.n_params for change in changes)
    kinds = sorted({name.split(".")[-2] for name in adapter.changes})
    ranks = sorted({change.rank for change in changes})
    scales = sorted({change.scale for change in changes})
    yield column("changes", f"{counted(len(changes), 'layer')}: {', '.join(kinds)}")
    yield column("rank", f"{', '.join(map(str, ranks))}; {n_params:,} parameters")
    yield column("scale", ", ".join(f"{scale:g}" for scale in scales))
    whole = adapter.whole.tensors
    if whole:
        yield column("whole", f"{counted(len(whole), 'tensor')}: {named_list(whole)}")
    if base is not None:
        yield from whole_model_lines(path, base)


def info_lines(path: Path, base: str | None = None) -> Iterator[str]:
    """What a folder or file holds. ValueError where it could not be loaded. base: of an adapter."""
    folder = adapter_folder(path)
    if folder is not None:
        yield from adapter_lines(folder, base)
        return
    found = find_weights(path)
    files = open_found(path, found)
    n_params = count_parameters(files)
    has_llm = n_params["llm"] > 0
    has_tower = n_params["vision_tower"] > 0
    has_projector = n_params["mm_projector"] > 0
    yield str(path)
    yield column("layout", layout_of(files))
    yield from files_lines(found)
    yield tensors_line(files)
    check_tensors_are_plain(files, set(PARTS))
    for part, n in n_params.items():
        yield column(part, f"{n:>16,} parameters" if n else "none inside")

    where = folder_of(path) / "config.json"
    has_config = where.is_file()
    raw = {}
    if has_config:
        raw, where = read_config(path)
    if has_llm:
        if not has_config:
            raise ValueError(
                f"{path}: no config.json beside it: it tells heads, norms and rotations, "
                "which no tensor shows"
            )
        yield from language_lines(path, raw, where)
    elif has_tower and has_config:
        yield tower_line(raw, where)
        check_tower_processor(where.parent, vision_config(raw, where).image_size)

    if has_llm and (has_projector or has_tower):
        yield from whole_model_lines(path)
        return
    check_all_known(files)
    if not has_llm and not has_tower:
        yield projector_line(files, raw)
    else:
        yield "  one part of a model: give it as --llm or --vision"
