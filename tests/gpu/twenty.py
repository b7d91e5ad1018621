"""20 steps of each stage on the device beside the same on the CPU: losses and gradient norms, one
rank and all GPUs, in float32 and in bf16; all in one plot."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from demo.toy import save_random_weights
from gpu.processes import finish, logged_steps, on_device, train_words
from gpu.table import Context, Row
from gpu.world import shared_folder, toy_world
from qilin_min import TextConfig, VisionConfig
from training.log import HEIGHT, LEFT, TOP, WIDTH, Axes, draw_axes, draw_curve

N_STEPS = 20
BATCH = 8
# small enough that 20 steps of AdamW do not blow up a last digit
LR = {1: 1e-3, 2: 2e-4}
DATA = {1: "alignment.json", 2: "instruction.json"}
# relative, of (losses, gradient norms); bf16 has 8 bits of each number
LIMITS = {"float32": (1e-3, 1e-3), "bfloat16": (2e-2, 5e-2)}
NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}


@dataclass
class Kind:
    """One way to run the same 20 steps."""

    name: str
    is_on_cpu: bool
    dtype: str
    ranks: int
    color: str


def kinds_of(context: Context) -> list[Kind]:
    """The reference first."""
    n_gpus = 2 if context.is_dry else torch.cuda.device_count()
    kinds = [
        Kind("CPU float32", True, "float32", 0, "#222222"),
        Kind("float32", False, "float32", 0, "#1f5fa8"),
        Kind("bf16", False, "bfloat16", 0, "#d2452d"),
    ]
    if n_gpus > 1:
        kinds.append(Kind(f"float32, {n_gpus} ranks", False, "float32", n_gpus, "#3a9a4b"))
    return kinds


@dataclass
class Curve:
    """Of one run, a number a step."""

    losses: list[float]
    norms: list[float]


def twenty_steps(context: Context) -> list[Row]:
    """A row for each stage and way to run it; --quick: of stage 2, which trains more."""
    weights = make_weights(context)
    rows = []
    panels = []
    stages = (2,) if context.is_quick else (1, 2)
    for stage in stages:
        curves = {}
        for kind in kinds_of(context):
            curves[kind.name] = run_steps(context, weights, stage, kind)
        want = curves["CPU float32"]
        for kind in kinds_of(context)[1:]:
            rows.append(row_of(stage, kind, want, curves[kind.name]))
        for what in ("losses", "norms"):
            lines = {name: getattr(curve, what) for name, curve in curves.items()}
            panels.append(draw_panel(f"stage {stage}: {what}", lines, kinds_of(context)))
    picture = paste(panels)
    picture.save(context.out / "twenty.png")
    # beside the table, where who sends it finds it
    picture.save(context.out.parent.parent / "twenty.png")
    return rows


def make_weights(context: Context) -> Path:
    """A folder with llama/ and clip/: random weights that learn; in a dry run the toy's own."""
    toy = toy_world(context)
    if context.is_dry:
        return toy
    folder = shared_folder(context) / "weights"
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("llama", "clip"):
        (folder / name).mkdir(parents=True)
    shutil.copy(toy / "llama/tokenizer.model", folder / "llama")
    text = TextConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=4,
        num_attention_heads=8,
    )
    vision = VisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    save_random_weights(folder, text, vision, seed=0)
    (folder / "done").touch()
    return folder


def run_steps(context: Context, weights: Path, stage: int, kind: Kind) -> Curve:
    """20 steps of a stage."""
    toy = toy_world(context)
    name = f"stage{stage} {kind.name}".replace(" ", "-").replace(",", "")
    out = context.out / name
    start = ("--llm", weights / "llama", "--vision", weights / "clip")
    words = train_words(stage, toy, out, (toy / DATA[stage],), start)
    words += ["--batch-size", BATCH, "--epochs", N_STEPS, "--max-steps", N_STEPS]
    words += ["--lr", LR[stage], "--dtype", kind.dtype, "--micro-batch-size", 4]
    words += on_device("cpu" if kind.is_on_cpu else context.device.type)
    finish(context, name, *words, ranks=kind.ranks, env=NO_TF32)
    steps = logged_steps(out)
    if len(steps) != N_STEPS:
        raise RuntimeError(f"{out}: {len(steps)} steps logged, not {N_STEPS}")
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "final")
    return Curve([step["loss"] for step in steps], [step["grad_norm"] for step in steps])


def largest_gap(got: list[float], want: list[float]) -> float:
    """Relative."""
    return max(abs(a / b - 1) for a, b in zip(got, want, strict=True))


def row_of(stage: int, kind: Kind, want: Curve, got: Curve) -> Row:
    """Losses of all steps, and gradient norms: AdamW hides a constant factor, the norm does not."""
    loss_limit, norm_limit = LIMITS[kind.dtype]
    loss_gap = largest_gap(got.losses, want.losses)
    norm_gap = largest_gap(got.norms, want.norms)
    return Row(
        f"{N_STEPS} steps of stage {stage}, {kind.name}, beside the CPU's float32",
        f"losses within {loss_limit:.0e}, gradient norms within {norm_limit:.0e} (relative)",
        f"losses {loss_gap:.1e}, norms {norm_gap:.1e}; "
        f"loss {got.losses[0]:.3f} to {got.losses[-1]:.3f}",
        loss_gap <= loss_limit and norm_gap <= norm_limit,
    )


# --- the plot -------------------------------------------------------------------------------------


def draw_panel(title: str, lines: dict[str, list[float]], kinds: list[Kind]) -> Image.Image:
    """Lines over the steps, on a log scale, the reference broad beneath the others."""
    values = [max(value, 1e-6) for line in lines.values() for value in line]
    axes = Axes(N_STEPS, low=min(values) / 1.1, high=max(values) * 1.1)
    image = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    draw_axes(pen, axes)
    x = 2 * LEFT
    pen.text((x, 2 * TOP - 16), title, fill="#222222", anchor="ls", font_size=28)
    for place, kind in enumerate(kinds):
        points = list(enumerate(lines[kind.name], 1))
        draw_curve(pen, axes, points, kind.color, width=14 if place == 0 else 5)
        y = 2 * TOP + 40 + 34 * place
        pen.text((2 * WIDTH - 60, y), kind.name, fill=kind.color, anchor="rs", font_size=26)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def paste(panels: list[Image.Image]) -> Image.Image:
    """Two beside each other, a stage a line."""
    whole = Image.new("RGB", (2 * WIDTH, HEIGHT * len(panels) // 2), "white")
    for place, panel in enumerate(panels):
        whole.paste(panel, (WIDTH * (place % 2), HEIGHT * (place // 2)))
    return whole
