"""A run that is killed, or asked to stop, and started again, beside one that never stopped; what it
exports beside its last checkpoint."""

import os
import shutil
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from gpu.processes import finish, has_option, launch, logged_steps, on_device, train_words
from gpu.table import Context, Row
from gpu.twenty import make_weights
from gpu.world import toy_world
from model_io.load import load_qilin
from training.checkpoints import read_state, step_of

# relative, of losses after going on with sums taken in another order
NOISE = 1e-2


def resume(context: Context) -> list[Row]:
    """Killed and stopped; on CUDA sums are taken in no fixed order."""
    return rows_of(context, "default", [])


def deterministic(context: Context) -> list[Row]:
    """The same with kernels that give the same bits each time."""
    if not has_option("deterministic"):
        return [Row("--deterministic", "an option of train.py", "train.py has none", None)]
    return rows_of(context, "deterministic", ["--deterministic"])


def rows_of(context: Context, kind: str, how: list[object]) -> list[Row]:
    """The same run three times: left alone, killed, stopped by SIGTERM."""
    whole = context.out / f"{kind}-whole"
    save_every = n_steps(context) // 4
    finish(context, whole.name, *words(context, whole, save_every, how))
    killed = context.out / f"{kind}-killed"
    kill_and_go_on(context, killed, words(context, killed, save_every, how))
    stopped = context.out / f"{kind}-stopped"
    stop_row = stop_and_go_on(context, stopped, words(context, stopped, 10**6, how), kind)
    rows = [
        same_row(kind, "killed by SIGKILL", whole, killed),
        stop_row,
        same_row(kind, "stopped by SIGTERM", whole, stopped),
        export_row(kind, whole),
    ]
    for out in (whole, killed, stopped):
        shutil.rmtree(out)
    return rows


def n_steps(context: Context) -> int:
    """Enough to be caught in the middle."""
    return 24 if context.is_dry else 80


def words(context: Context, out: Path, save_every: int, how: list[object]) -> list[object]:
    """Stage 2 on the toy world, with the optimiser's states of all weights."""
    toy = toy_world(context)
    weights = make_weights(context)
    start = ("--llm", weights / "llama", "--vision", weights / "clip")
    options = train_words(2, toy, out, (toy / "instruction.json",), start)
    n = n_steps(context)
    options += ["--batch-size", 8, "--epochs", n, "--max-steps", n, "--lr", 2e-4]
    options += ["--save-every", save_every, "--keep", 1, *how]
    return [*options, *on_device(context.device.type)]


def kill_and_go_on(context: Context, out: Path, options: list[object]) -> None:
    """Kill it once a checkpoint is behind it, then start it again."""
    started = launch(context, out.name, *options)

    def is_past_checkpoint() -> bool:
        newest = max(steps_on_disk(out), default=0)
        return newest > 0 and len(logged_steps(out)) > newest + 1

    started.wait_for(is_past_checkpoint, "step after a checkpoint")
    os.kill(started.process.pid, signal.SIGKILL)
    started.process.wait()
    if (out / "final").exists():
        raise RuntimeError(f"{out}: it had ended before it was killed")
    finish(context, out.name, *options)


def steps_on_disk(out: Path) -> list[int]:
    """Of the checkpoints that have their names, which they are given when they are whole."""
    steps = [step_of(path) for path in (out / "checkpoints").glob("step-*")]
    return [step for step in steps if step is not None]


def stop_and_go_on(context: Context, out: Path, options: list[object], kind: str) -> Row:
    """SIGTERM leaves a whole checkpoint of the last step, soon, and exit code 143."""
    started = launch(context, out.name, *options)
    started.wait_for(lambda: len(logged_steps(out)) >= 3, "step 3")
    started.process.send_signal(signal.SIGTERM)
    tic = time.monotonic()
    started.finish(codes=(0, 143))
    seconds = time.monotonic() - tic
    code = started.process.returncode
    step = len(logged_steps(out))
    path = out / f"checkpoints/step-{step}"
    progress, _ = read_state(path)
    size = sum(file.stat().st_size for file in path.iterdir())
    measured = (
        f"exit code {code} after {seconds:.1f} s, whole checkpoint of step {progress.step} "
        f"({size / 1e9:.2f} GB)"
    )
    finish(context, out.name, *options)
    return Row(
        f"SIGTERM ({kind})",
        f"exit code 143, a whole checkpoint of the last step in log.jsonl ({step})",
        measured,
        code == 143 and progress.step == step,
    )


def same_row(kind: str, what: str, whole: Path, other: Path) -> Row:
    """Losses, norms and weights of both runs; bit for bit where kernels are deterministic or the
    device is a CPU."""
    want = [(step["loss"], step["grad_norm"]) for step in logged_steps(whole)]
    got = [(step["loss"], step["grad_norm"]) for step in logged_steps(other)]
    weights = [weight_bytes(out) for out in (whole, other)]
    is_same = got == want and weights[0] == weights[1]
    gap = float("inf")
    if len(got) == len(want):
        gap = max(abs(a[0] / b[0] - 1) for a, b in zip(got, want, strict=True))
    is_exact = kind == "deterministic"
    equal = "equal bit for bit" if is_same else "not equal bit for bit"
    expected = "bit for bit" if is_exact else f"losses within {NOISE:.0e}"
    return Row(
        f"{what} and started again, beside a run left alone ({kind})",
        f"{expected}: {len(want)} steps",
        f"{len(got)} steps, {equal}, losses within {gap:.1e}",
        is_same if is_exact else gap <= NOISE,
    )


def weight_bytes(out: Path) -> list[bytes]:
    """Of the exported folder."""
    return [path.read_bytes() for path in final_files(out)]


def export_row(kind: str, out: Path) -> Row:
    """Every trained tensor of the export is the last checkpoint's, rounded to the export's
    dtype."""
    path = out / f"checkpoints/step-{max(steps_on_disk(out))}"
    single = out / "checkpoint.pt"
    dcp_to_torch_save(path, single)
    saved = torch.load(single, weights_only=True)["model"]
    single.unlink()
    stored = {tensor.dtype for file in final_files(out) for tensor in load_file(file).values()}
    dtype = next(iter(stored))
    exported = dict(load_qilin(out, dtype=dtype).named_parameters())
    n_equal = 0
    for name, tensor in saved.items():
        # the export's rows are padded, the loaded model's are too
        n_equal += torch.equal(exported[name][: len(tensor)], tensor.to(dtype))
    return Row(
        f"export beside the last checkpoint ({kind})",
        f"all {len(saved)} trained tensors equal in {dtype}",
        f"{n_equal} of {len(saved)}",
        n_equal == len(saved) > 0 and len(stored) == 1,
    )


def final_files(out: Path) -> list[Path]:
    return sorted((out / "final").glob("*.safetensors"))
