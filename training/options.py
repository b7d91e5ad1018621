"""Options of train.py: what can be typed, what goes together, and RunSettings, what comes of it."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.options import InRange
from model_io.load import trained_mode
from model_io.tokens import TEMPLATES
from qilin_min import PROJECTORS, QilinConfig
from training.plan import ALIGNMENT_TEXTS, LLAMA_SIZES
from training.stages import Stage

DEFAULT_WEIGHTS = {
    "llm": "weights/Llama2-Chinese-13b-Chat",
    "vision": "weights/clip-vit-large-patch14-336",
}
MOST = 10**9


@dataclass(frozen=True)
class RunSettings:
    """What a run works with: what was typed, else what its stage says. run.json lists it all."""

    stage: int

    # what is trained on what
    llm: str | None
    vision: str | None
    model: str | None
    base: str | None
    projector: str | None
    projector_type: str | None
    data: list[str]
    images: str
    strict: bool
    max_length: int
    template: str
    image_mode: str

    # how it learns
    batch_size: int
    lr: float
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    max_bad_steps: int
    epochs: int
    max_steps: int
    seed: int
    lora: int
    lora_alpha: float
    lora_export: str
    quantize: str | None

    # how it fits
    micro_batch_size: int | None
    checkpoint_layers: int | None
    reshard: str
    replicate: int
    device: str
    dtype: str
    # None: on CUDA where it can be
    compile: bool | None
    workers: int | None

    # stopping and going on
    out: Path
    save_every: int
    keep: int
    deterministic: bool
    resume: str
    allow_changes: bool

    # what one sees
    val_data: str | None
    eval_every: int
    samples: int
    log_every: int
    tensorboard: bool

    # before a run
    plan: bool
    world_size: int
    gpu_memory: float | None
    gpu_tflops: float | None
    gpu_bandwidth: float | None
    size: str
    alignment_text: str
    smoke: bool

    # no options: what follows from them
    trained: tuple[str, ...]
    is_default_data: bool


# --- 1. what can be typed -------------------------------------------------------------------------
# None stands for what the stage says, or the plan


def training_parser(
    description: str | None, stages: dict[int, Stage], lora: dict[str, Any]
) -> argparse.ArgumentParser:
    """The options, by group."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    goals = [f"{number}: {stage.goal}" for number, stage in stages.items()]
    numbers = ",".join(map(str, stages))
    parser.add_argument("--stage", type=int, metavar=f"{{{numbers}}}", help="; ".join(goals))
    add_data_options(parser, stages)
    add_learning_options(parser, stages, lora)
    add_adapter_options(parser, stages)
    add_fitting_options(parser, stages)
    add_resuming_options(parser, stages)
    add_watching_options(parser)
    add_planning_options(parser)
    return parser


def add_data_options(parser: argparse.ArgumentParser, stages: dict[int, Stage]) -> None:
    """What is trained on what."""
    add = parser.add_argument_group("what is trained on what").add_argument
    add("--llm", default=None, help=f"LLaMA folder (default {DEFAULT_WEIGHTS['llm']})")
    add("--vision", default=None, help=f"CLIP folder (default {DEFAULT_WEIGHTS['vision']})")
    add("--model", default=None, help="a whole model to go on from, in place of --llm and --vision")
    add("--base", default=None, help="where --model is a peft adapter: what it is merged into")
    projectors = ", ".join(
        f"stage {number} {first_projector(stage, stages) or 'fresh'}"
        for number, stage in stages.items()
    )
    add(
        "--projector",
        default=None,
        help=f"file to start from, or `fresh` (default: the one in --model; else {projectors})",
    )
    add(
        "--projector-type",
        default=None,
        choices=PROJECTORS,
        help="of a fresh one: the paper's, or the released weights' (default linear)",
    )
    add(
        "--data",
        nargs="+",
        default=None,
        help=".json lists or .jsonl of {id, image, conversations}, or of dialogs under other keys; "
        "several are mixed. ChiMed-VL-Alignment.jsonl as released is PMC-OA alone "
        f"(default {', '.join(stage.data for stage in stages.values())})",
    )
    add(
        "--images",
        default="data/chimed/images",
        help="folder that the data's picture names are relative to (default %(default)s)",
    )
    add(
        "--strict",
        action="store_true",
        help="stop when a picture does not decode (default: a grey one takes its place and the "
        "sample teaches nothing; counted and logged)",
    )
    add(
        "--max-length",
        action=InRange,
        type=int,
        low=2,
        high=MOST,
        default=2048,
        help="tokens of a sample, pictures included; the end of longer ones is cut "
        "(default %(default)s)",
    )
    add(
        "--template",
        choices=TEMPLATES,
        default="v1",
        help="v1: dialogs, as in the paper; plain: picture then caption, the released stage 1",
    )
    add(
        "--image-mode",
        choices=("pad", "crop"),
        default=None,
        help="how a picture becomes square (default: as --model was trained; for parts pad)",
    )


def add_learning_options(
    parser: argparse.ArgumentParser, stages: dict[int, Stage], lora: dict[str, Any]
) -> None:
    """How it learns."""
    add = parser.add_argument_group("how it learns").add_argument
    batch_sizes = ", ".join(str(stage.batch_size) for stage in stages.values())
    add(
        "--batch-size",
        action=InRange,
        type=int,
        low=1,
        high=MOST,
        default=None,
        help=f"samples a step over all ranks (default {batch_sizes})",
    )
    rates = ", ".join(short(stage.lr) for stage in stages.values())
    add(
        "--lr",
        action=InRange,
        type=float,
        low=0,
        high=10,
        default=None,
        help=f"peak learning rate (default {rates}; with --lora {short(lora['lr'])})",
    )
    add(
        "--warmup-ratio",
        action=InRange,
        type=float,
        low=0,
        high=1,
        default=0.03,
        help="share of the steps before the peak (default %(default)s)",
    )
    add(
        "--weight-decay",
        action=InRange,
        type=float,
        low=0,
        high=1,
        default=0.0,
        help="(default %(default)s)",
    )
    add(
        "--max-grad-norm",
        action=InRange,
        type=float,
        low=0,
        high=MOST,
        default=1.0,
        help="gradient norm is clipped there, 0: never (default %(default)s)",
    )
    add(
        "--max-bad-steps",
        action=InRange,
        type=int,
        low=1,
        high=MOST,
        default=10,
        help="steps in a row whose loss is not finite or explodes: each is skipped, so many stop "
        "the run (default %(default)s)",
    )
    add(
        "--epochs",
        action=InRange,
        type=int,
        low=1,
        high=10**4,
        default=1,
        help="(default %(default)s)",
    )
    add(
        "--max-steps",
        action=InRange,
        type=int,
        low=0,
        high=MOST,
        default=0,
        help="stop the run after this many steps; the schedule ends there as well (0: by --epochs)",
    )
    add(
        "--seed",
        action=InRange,
        type=int,
        low=0,
        high=2**31,
        default=0,
        help="of the order of samples and of what starts fresh (default %(default)s)",
    )


def add_adapter_options(parser: argparse.ArgumentParser, stages: dict[int, Stage]) -> None:
    """Less than all weights, in less than all bits."""
    add = parser.add_argument_group("adapters and low bits").add_argument
    add(
        "--lora",
        action=InRange,
        type=int,
        low=0,
        high=4096,
        default=0,
        metavar="RANK",
        help=f"{tuning_stages(stages)}: train low-rank adapters of the language model instead of "
        "all of it; merged at the end",
    )
    add(
        "--lora-alpha",
        action=InRange,
        type=float,
        low=0,
        high=MOST,
        default=None,
        help="their scale is alpha / rank (default: twice the rank)",
    )
    add(
        "--lora-export",
        choices=("merged", "adapter"),
        default="merged",
        help="what final/ holds: the whole model, or adapters and projector alone, in peft's form "
        "(default %(default)s)",
    )
    add(
        "--quantize",
        choices=("int8", "int4"),
        default=None,
        help="keep the language model's frozen blocks in so many bits, whole on every GPU "
        f"({tuning_stages(stages, are_tuning=False)}, or --lora)",
    )


def add_fitting_options(parser: argparse.ArgumentParser, stages: dict[int, Stage]) -> None:
    """How it fits: the plan chooses what is not given."""
    group = parser.add_argument_group("how it fits (the plan chooses what is not given)")
    add = group.add_argument
    largest = ", ".join(str(stage.micro_batch_size) for stage in stages.values())
    add(
        "--micro-batch-size",
        action=InRange,
        type=int,
        low=1,
        high=MOST,
        default=None,
        help=f"samples a GPU holds at one time (default: chosen, at most the paper's {largest})",
    )
    add(
        "--checkpoint-layers",
        action=InRange,
        type=int,
        low=0,
        high=MOST,
        default=None,
        help="blocks that recompute activations in backward (default: as few as each batch needs)",
    )
    add(
        "--reshard",
        choices=("auto", "always", "never"),
        default="auto",
        help="free a block's gathered weights between forward and backward "
        "(default auto: where memory wants it)",
    )
    add(
        "--replicate",
        action=InRange,
        type=int,
        low=1,
        high=MOST,
        default=1,
        help="HSDP: so many copies of the sharded weights, one a node: only gradients cross nodes "
        "(default %(default)s)",
    )
    add(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="auto: the GPUs; a torch built for GPUs that finds none it can use stops and says why",
    )
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="numbers in forward and backward, and in final/; what is trained is kept in float32 "
        "all the same (default auto: bfloat16 on CUDA; on a CPU what is measured to be faster)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile each block: faster steps after a slow first one (default: on CUDA "
        "where triton and a C compiler are)",
    )
    add(
        "--workers",
        action=InRange,
        type=int,
        low=0,
        high=256,
        default=None,
        help="processes a rank that decode pictures ahead (default: spare cores, at most 8)",
    )


def add_resuming_options(parser: argparse.ArgumentParser, stages: dict[int, Stage]) -> None:
    """Stopping and going on."""
    add = parser.add_argument_group("stopping and going on").add_argument
    folders = ", ".join(stage.out for stage in stages.values())
    add("--out", type=Path, default=None, help=f"folder to write (default {folders})")
    add(
        "--save-every",
        action=InRange,
        type=int,
        low=1,
        high=MOST,
        default=500,
        help="steps between two checkpoints (default %(default)s)",
    )
    add(
        "--keep",
        action=InRange,
        type=int,
        low=1,
        high=MOST,
        default=2,
        help="newest checkpoints kept (default %(default)s)",
    )
    add(
        "--deterministic",
        action="store_true",
        help="on CUDA: killed and gone on, or run again on the same GPUs, it comes to the same "
        "bits (a CPU does anyway); slower, nothing is compiled",
    )
    add(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="go on from the newest whole checkpoint in --out, from none, or from this one "
        "(default auto)",
    )
    add(
        "--allow-changes",
        action="store_true",
        help="resume although data, weights or settings differ from the checkpoint's",
    )


def add_watching_options(parser: argparse.ArgumentParser) -> None:
    """What one sees."""
    add = parser.add_argument_group("what one sees").add_argument
    add(
        "--val-data",
        default=None,
        help="held-out file: its loss is logged, some of its questions are answered",
    )
    add(
        "--eval-every",
        action=InRange,
        type=int,
        low=1,
        high=MOST,
        default=500,
        help="steps between two looks at --val-data (default %(default)s; also before and after)",
    )
    add(
        "--samples",
        action=InRange,
        type=int,
        low=0,
        high=MOST,
        default=4,
        help="questions of --val-data answered at each look (default %(default)s)",
    )
    add(
        "--log-every",
        action=InRange,
        type=int,
        low=1,
        high=MOST,
        default=1,
        help="steps between two printed lines; log.jsonl has every step (default %(default)s)",
    )
    add(
        "--tensorboard",
        action="store_true",
        help="also write --out/tensorboard (pip install tensorboard)",
    )


def add_planning_options(parser: argparse.ArgumentParser) -> None:
    """Before a run."""
    add = parser.add_argument_group("before a run").add_argument
    add(
        "--plan",
        action="store_true",
        help="print memory, work, hours and disk, and stop; without weights or data the paper's, "
        "saying so",
    )
    add(
        "--world-size",
        action=InRange,
        type=int,
        low=1,
        high=10**5,
        default=8,
        help="GPUs of the plan (default %(default)s)",
    )
    add(
        "--gpu-memory",
        action=InRange,
        type=float,
        low=0.001,
        high=10**5,
        default=None,
        help="GiB a GPU (default: what is there; for --plan 80)",
    )
    add(
        "--gpu-tflops",
        action=InRange,
        type=float,
        low=0.001,
        high=10**6,
        default=None,
        help="its peak in bf16 (default: known by its name; for --plan 312, an A100)",
    )
    add(
        "--gpu-bandwidth",
        action=InRange,
        type=float,
        low=0.001,
        high=10**5,
        default=None,
        metavar="GB/S",
        help="what reaches a GPU from the others in an all-gather (default: measured at the start, "
        "and kept with the checkpoints; for --plan 200, NVLink of an A100; without NVLink some 20)",
    )
    add(
        "--size",
        choices=LLAMA_SIZES,
        default="13B",
        help="of the plan where there are no weights (default %(default)s)",
    )
    texts = "; ".join(f"{name}: {about}" for name, about in ALIGNMENT_TEXTS.items())
    add(
        "--alignment-text",
        choices=ALIGNMENT_TEXTS,
        default="draw",
        help=f"of the plan of stage 1 where there is no data (default %(default)s). {texts}",
    )
    add(
        "--smoke",
        action="store_true",
        help="train, kill, resume and export a random model on this machine's GPUs (or CPU); "
        "a table of what works",
    )


def first_projector(stage: Stage, stages: dict[int, Stage]) -> str | None:
    """The projector that a stage starts from; None: a fresh one."""
    if stage.projector_of is None:
        return None
    return stages[stage.projector_of].projector_file


def tuning_stages(stages: dict[int, Stage], are_tuning: bool = True) -> str:
    """Those stages that train weights of the language model, or those that leave it alone."""
    numbers = [str(n) for n, stage in stages.items() if stage.is_llm_tuned == are_tuning]
    return f"stage {', '.join(numbers)}"


def short(number: float) -> str:
    """1e-3 for 0.001."""
    digits, exponent = f"{number:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


# --- 2. what goes together ------------------------------------------------------------------------


def settle(typed: dict[str, Any], stages: dict[int, Stage], lora: dict[str, Any]) -> RunSettings:
    """RunSettings from what was typed and, where nothing was, from the stage's row. ValueError or
    FileNotFoundError for what does not go together."""
    number = typed["stage"]
    if number not in stages:
        numbers = ", ".join(map(str, stages))
        raise ValueError(f"--stage {number}: no such stage; train.py's STAGES has {numbers}")
    check_contradictions(typed, stages)
    stage = stages[number]
    if typed["lora"]:
        stage = replace(stage, **lora)

    values = dict(typed)
    for name in ("lr", "batch_size"):
        if typed[name] is None:
            values[name] = getattr(stage, name)
    values["out"] = Path(stage.out if typed["out"] is None else typed["out"])
    values["data"] = typed["data"] or [stage.data]
    if typed["lora_alpha"] is None:
        values["lora_alpha"] = 2.0 * typed["lora"]
    values["image_mode"] = typed["image_mode"] or default_mode(typed)
    if typed["model"] is None:
        for part, path in DEFAULT_WEIGHTS.items():
            values[part] = typed[part] or path
        if typed["projector"] is None:
            values["projector"] = first_projector(stage, stages)
            if not typed["plan"]:
                check_projector(values["projector"], number, stage)
    return RunSettings(
        **values,
        trained=stage.trained,
        is_default_data=typed["data"] is None,
    )


def default_mode(typed: dict[str, Any]) -> str:
    """How pictures become square where nobody says it: as the model to go on from was trained."""
    # of parts nobody knows, and a plan may be made for a model that is not there yet
    if typed["model"] is None or typed["plan"]:
        return QilinConfig.image_mode
    return trained_mode(typed["model"], typed["llm"], typed["base"])


def check_contradictions(typed: dict[str, Any], stages: dict[int, Stage]) -> None:
    """ValueError for options that do not go with the stage, or with each other."""
    number = typed["stage"]
    is_tuned = stages[number].is_llm_tuned
    if typed["lora"] and not is_tuned:
        raise ValueError(
            f"--lora trains adapters of the language model, which stage {number} leaves alone: "
            f"give it to --{tuning_stages(stages)}"
        )
    if typed["lora_export"] == "adapter" and not typed["lora"]:
        raise ValueError("--lora-export adapter needs adapters: add --lora RANK")
    if typed["lora_export"] == "adapter" and typed["quantize"]:
        raise ValueError(
            f"--lora-export adapter with --quantize {typed['quantize']}: adapters learnt on "
            "rounded weights belong to those, which no base holds; leave one of the two out"
        )
    if typed["plan"] and typed["dtype"] == "float32":
        raise ValueError("--plan reckons with bfloat16: leave --dtype float32 out")
    if typed["quantize"] and is_tuned and not typed["lora"]:
        raise ValueError(
            f"--quantize {typed['quantize']} keeps the language model frozen: add --lora RANK"
        )


def check_projector(projector: str | None, number: int, stage: Stage) -> None:
    """FileNotFoundError unless the projector that a stage starts from is there."""
    if projector and not Path(projector).is_file():
        raise FileNotFoundError(
            f"stage {number} starts from {projector}, which is not there: "
            f"run --stage {stage.projector_of}, or give --projector FILE or --projector fresh"
        )
