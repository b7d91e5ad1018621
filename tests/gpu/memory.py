"""Memory: what the plan says a step takes beside what torch's allocator saw, within 10 %; and what
is said when it is too much."""

import math
import subprocess
import sys

import torch
import torch.distributed as dist

from gpu.expected import (
    REACHED,
    StepShape,
    config_of,
    largest_model,
    own_shapes,
    rates_of,
    shapes_of_eight,
    step_flops,
    step_parts,
)
from gpu.processes import on_device, train_words
from gpu.rig import Measured, measure, play_ranks
from gpu.table import Context, Row
from gpu.world import toy_world
from training.costs import GIB, RESERVE_GIB

# of the plan's figure, at most: on a GPU, and of a tiny model, where more is rounding
WITHIN = 0.10
WITHIN_DRY = 0.15


def memory(context: Context) -> list[Row]:
    """A model that this GPU holds whole: both stages, recomputing or not, LoRA on int8."""
    model = "tiny"
    if context.device.type == "cuda":
        model = largest_model(memory_of(context.device))
        # its steps take longer than they tell
        model = "3B" if model == "7B" else model
    play_ranks(1, context.device)
    rows = []
    for shape in own_shapes(model, context.is_dry):
        rows.append(memory_row(context, shape, n_shards=1)[0])
    dist.destroy_process_group()
    return rows


def rank0_of_eight(context: Context) -> list[Row]:
    """The first of eight GPUs that share the true 13B: its memory, and how fast it computes."""
    play_ranks(8, context.device)
    rates = rates_of(context.figures, context.is_dry)
    e = bytes_of_number(context.device)
    rows = []
    for shape in shapes_of_eight(context.is_dry):
        row, measured = memory_row(context, shape, n_shards=8)
        rows.append(row)
        if measured is None:
            continue
        work = step_flops(shape, e)
        at_most = work / step_parts(shape, rates, 8, e).total / 1e12
        reached = work / measured.seconds / 1e12
        context.figures[f"eight: {shape.what}: TFLOPS"] = round(reached, 1)
        rows.append(
            Row(
                f"speed of {label(shape, 8)}",
                f"about {REACHED * at_most:.3g}, at most {at_most:.3g} TFLOPS "
                f"({whose_rates(context.is_dry)}, eager)",
                f"{reached:.4g} TFLOPS, {measured.seconds:.3f} s a step; links cost nothing",
                None,
            )
        )
    dist.destroy_process_group()
    return rows


def whose_rates(is_dry: bool) -> str:
    """What a computed figure holds for."""
    return "computed for an A100" if is_dry else "computed"


def bytes_of_number(device: torch.device) -> int:
    """bf16 on CUDA, float32 on a CPU."""
    return 2 if device.type == "cuda" else 4


def memory_of(device: torch.device) -> float:
    """Bytes of this GPU; a CPU's are never too few here."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return math.inf


def label(shape: StepShape, n_shards: int) -> str:
    whose = "one GPU" if n_shards == 1 else f"rank 0 of {n_shards}"
    return f"{shape.model} on {whose}, {shape.what}, {shape.rows} x {shape.tokens}"


def memory_row(context: Context, shape: StepShape, n_shards: int) -> tuple[Row, Measured | None]:
    """(the row of one shape, what was measured); too little memory is a row that does not hold."""
    want = shape.peak(n_shards, bytes_of_number(context.device))
    check = f"memory of {label(shape, n_shards)}"
    unit = GIB if context.device.type == "cuda" else 2**20
    name = "GiB" if context.device.type == "cuda" else "MiB"
    within = WITHIN_DRY if context.is_dry else WITHIN
    expected = f"{want / unit:.1f} {name}, within {within:.0%}"
    room = memory_of(context.device)
    if want + RESERVE_GIB * GIB > room:
        return Row(check, expected, f"not run: this GPU has {room / GIB:.0f} GiB", None), None
    try:
        measured = measure(shape, config_of(shape.model), context.device, n_timed=3)
    except torch.OutOfMemoryError as error:
        return Row(check, expected, f"out of memory: {str(error)[:120]}", False), None
    off = measured.peak / want - 1
    said = f"{measured.peak / unit:.1f} {name} ({off:+.1%})"
    if measured.reserved:
        said += f", {measured.reserved / unit:.1f} reserved"
    return Row(check, expected, said, abs(off) <= within), measured


# --- too much -------------------------------------------------------------------------------------

# train.py, allowed so little of the GPU that it runs out of it; on a CPU, which never says so, the
# error comes from the model
TOO_LITTLE = """
import sys
import torch
import train
from common.files import run_cli

if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction({share})
else:
    def forward(*args, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    train.Qilin.forward = forward
sys.argv[0] = "train.py"
run_cli(train.main)
"""
# of the GPU: what the toy's largest step takes many times over
BYTES_ALLOWED = 48 * 2**20


def out_of_memory(context: Context) -> list[Row]:
    """A run that takes more than there is ends with one line that says what to do, and code 1."""
    toy = toy_world(context)
    share = 1.0
    if context.device.type == "cuda":
        share = BYTES_ALLOWED / memory_of(context.device)
    start = ("--llm", toy / "llama", "--vision", toy / "clip")
    words = train_words(2, toy, context.out / "run", (toy / "instruction.json",), start)
    # all at one time, nothing recomputed
    words += ["--batch-size", 512, "--micro-batch-size", 512, "--checkpoint-layers", 0]
    words += on_device(context.device.type)
    done = subprocess.run(
        [sys.executable, "-c", TOO_LITTLE.format(share=share), *map(str, words[1:])],
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    line = lines[-1] if lines else done.stderr[-200:]
    holds = done.returncode == 1 and len(lines) == 1 and "a smaller --micro-batch-size" in line
    return [
        Row(
            "out of memory is answered",
            "exit code 1, one line: try a smaller --micro-batch-size",
            f"exit code {done.returncode}: {line}",
            holds and "Traceback" not in done.stderr,
        )
    ]
