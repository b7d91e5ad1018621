"""What one sees of a run, all from rank 0.

A line a step, log.jsonl, loss.png redrawn as it runs, held-out loss, answers to held-out questions,
run.json.
"""

import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from common.files import one_line, write_json, write_text
from model_io.tokens import count_images, encode_prompt
from qilin_min import Qilin, answer_ids
from training.batches import Dialogs, check_batches, count, cut_batch, load_ahead, to_device
from training.costs import GIB
from training.ranks import agree, print0, sum_over_ranks

Points = list[tuple[int, float]]  # (step, loss) each


# --- 1. the curve ---------------------------------------------------------------------------------
# in: losses by step; out: loss.png

WIDTH = 800
HEIGHT = 480
LEFT = 70
TOP = 40
RIGHT = 780
BOTTOM = 440

# the ratio of largest and smallest loss up to which these digits get a line, at each power of ten
TICK_DIGITS = (
    (6, (1, 2, 3, 4, 5, 6, 7, 8, 9)),
    (200, (1, 2, 5)),
    (math.inf, (1,)),
)


@dataclass
class Axes:
    """Where a point lies in a picture twice as large: it is halved in the end, for smooth lines.
    Loss on a log scale."""

    last_step: int
    low: float
    high: float

    def x(self, step: float) -> float:
        return 2 * (LEFT + (RIGHT - LEFT) * step / self.last_step)

    def y(self, loss: float) -> float:
        inside = min(max(loss, self.low), self.high)
        share = math.log(inside / self.low) / math.log(self.high / self.low)
        return 2 * (BOTTOM - (BOTTOM - TOP) * share)

    def at(self, step: float, loss: float) -> tuple[float, float]:
        return self.x(step), self.y(loss)

    def ticks(self) -> list[float]:
        """Losses that get a line."""
        ratio = self.high / self.low
        digits = next(digits for up_to, digits in TICK_DIGITS if ratio < up_to)
        found = []
        for exponent in range(-7, 10):
            for digit in digits:
                loss = digit * 10.0**exponent
                if self.low <= loss <= self.high:
                    found.append(loss)
        return found or [self.low, self.high]


def finite(points: Points) -> Points:
    return [(step, loss) for step, loss in points if math.isfinite(loss)]


def running_mean(points: Points) -> Points:
    """An exponential mean that starts without a bias to its first value."""
    smooth = []
    total = 0.0
    weight = 0.0
    for step, loss in finite(points):
        total = 0.95 * total + loss
        weight = 0.95 * weight + 1
        smooth.append((step, total / weight))
    return smooth


def draw_axes(pen: ImageDraw.ImageDraw, axes: Axes) -> None:
    """Lines and numbers of the losses, numbers of the steps."""
    for loss in axes.ticks():
        pen.line((*axes.at(0, loss), *axes.at(axes.last_step, loss)), fill="#e4e4e4", width=2)
        place = (2 * LEFT - 12, axes.y(loss))
        pen.text(place, f"{loss:.3g}", fill="#444444", anchor="rm", font_size=24)
    for step in sorted({round(axes.last_step * k / 5) for k in range(6)}):
        place = (axes.x(step), 2 * BOTTOM + 12)
        pen.text(place, f"{step}", fill="#444444", anchor="mt", font_size=24)


def draw_curve(
    pen: ImageDraw.ImageDraw, axes: Axes, points: Points, color: str, width: int
) -> None:
    places = [axes.at(step, loss) for step, loss in finite(points)]
    if len(places) > 1:
        pen.line(places, fill=color, width=width)


def draw_curves(path: Path, title: str, train: Points, held_out: Points) -> None:
    """loss.png: training loss a step (thin, and its running mean), held-out loss as dots."""
    points = finite(train + held_out)
    if not points:
        return
    losses = [max(loss, 1e-6) for _, loss in points]
    last_step = max(step for step, _ in points)
    axes = Axes(max(1, last_step), low=min(losses) / 1.1, high=max(losses) * 1.1)

    image = Image.new("RGB", (WIDTH * 2, HEIGHT * 2), "white")
    pen = ImageDraw.Draw(image)
    draw_axes(pen, axes)
    draw_curve(pen, axes, train, "#bcd3ee", width=2)
    draw_curve(pen, axes, running_mean(train), "#1f5fa8", width=5)
    for step, loss in held_out:
        x, y = axes.at(step, loss)
        pen.ellipse((x - 9, y - 9, x + 9, y + 9), fill="#d2452d")
    pen.text(
        (2 * LEFT, 2 * TOP - 16),
        f"{title}: loss by step (log scale), blue training, red held out",
        fill="#222222",
        anchor="ls",
        font_size=28,
    )

    partial = path.with_name(path.name + ".partial")
    image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(partial, format="PNG")
    partial.rename(path)


# --- 2. the log -----------------------------------------------------------------------------------
# in: what the loop learns of a step; out: log.jsonl, printed lines, loss.png


def entry_to_keep(line: str, start: int) -> dict | None:
    """The entry of a line of an earlier start's .jsonl that holds for a run that goes on after step
    `start`.

    Lines of steps done, skipped or blind up to it do; what is said at a step before it is trained
    (held-out loss, samples) is said again. None for the others, and for a line cut short by a kill,
    or damaged.
    """
    try:
        entry = json.loads(line)
        if any(key in entry for key in ("seconds", "bad", "grey")):
            is_kept = entry["step"] <= start
        else:
            is_kept = entry["step"] < start
        numbers = [entry.get("loss", 0), entry.get("val_loss", 0)]
        if "seconds" in entry:
            numbers.append(entry["loss"])
        for number in numbers:
            float(number)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return entry if is_kept else None


def open_tensorboard(folder: Path, start: int) -> Any:
    """TensorBoard's writer; ValueError where its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package more: pip install tensorboard") from None
    return SummaryWriter(folder, purge_step=start)


def used_memory(device: torch.device) -> int:
    """Bytes that this process had at its peak, of the GPU's memory where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reserved_memory(device: torch.device) -> int | None:
    """Bytes that torch had of the GPU at its peak, gaps between tensors included; None: no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    return None


class Log:
    """log.jsonl, loss.png and the printed lines, all from rank 0. A run that goes on at a step
    drops what was logged after it."""

    def __init__(
        self,
        out: Path,
        *,
        stage: int,
        n_steps: int,
        start: int,
        log_every: int,
        peak_flops: float | None,
        has_tensorboard: bool,
    ):
        """out: the run's folder; start: steps that an earlier start has done; peak_flops: of all
        GPUs a second, None: not known."""
        self.out = out
        self.stage = stage
        self.n_steps = n_steps
        self.log_every = log_every
        self.peak_flops = peak_flops
        self.train: Points = []
        self.held_out: Points = []
        self.seconds: deque[float] = deque(maxlen=50)  # of the last steps
        self.board: Any = None
        self.is_rank0 = dist.get_rank() == 0
        if self.is_rank0:
            for name in ("log.jsonl", "samples.jsonl"):
                self.truncate(out / name, start)
            self.file = open(out / "log.jsonl", "a", encoding="utf-8")
            if has_tensorboard:
                self.board = open_tensorboard(out / "tensorboard", start)
        self.bar = tqdm(
            total=n_steps,
            initial=start,
            desc=f"stage {stage}",
            unit="step",
            disable=None if self.is_rank0 else True,
        )
        self.drawn = time.monotonic()

    def truncate(self, path: Path, start: int) -> None:
        """Keep the lines that hold for a run that goes on after step `start`."""
        lines = []
        if start and path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = []
        for line in lines:
            entry = entry_to_keep(line, start)
            if entry is None:
                continue
            kept.append(line + "\n")
            if "seconds" in entry:
                self.train.append((entry["step"], entry["loss"]))
            elif "val_loss" in entry:
                self.held_out.append((entry["step"], entry["val_loss"]))
        if kept or path.name == "log.jsonl":
            write_text(path, "".join(kept))
        else:
            path.unlink(missing_ok=True)

    def write(self, **entry: object) -> None:
        """A line of log.jsonl, and its numbers on the board."""
        if not self.is_rank0:
            return
        self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.file.flush()
        if self.board:
            for name, value in entry.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, entry["step"])

    def say(self, step: int, *parts: str) -> None:
        print0(" | ".join([f"step {step}/{self.n_steps}", *parts]))

    def step(
        self,
        step: int,
        loss: float,
        lr: float,
        grad_norm: float,
        seconds: float,
        n: dict[str, float],
        n_flops: float,
        device: torch.device,
    ) -> None:
        """One line for step number `step` (1 is the first). n: what count() summed; n_flops: of
        costs.flops, for the whole step."""
        mfu = n_flops / seconds / self.peak_flops if self.peak_flops else None
        tokens_per_s = n["tokens"] / seconds
        padding = 1 - n["tokens"] / n["slots"]
        memory_gib = used_memory(device) / GIB
        reserved = reserved_memory(device)
        on_gpu = {} if reserved is None else {"reserved_gib": reserved / GIB}
        self.write(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_s=tokens_per_s,
            padding=padding,
            memory_gib=memory_gib,
            **on_gpu,
            mfu=mfu,
            n_targets=int(n["targets"]),
            seconds=seconds,
        )
        self.train.append((step, loss))
        self.seconds.append(seconds)
        self.bar.update()
        if step % self.log_every == 0 or step in (1, self.n_steps):
            mean_seconds = sum(self.seconds) / len(self.seconds)
            to_go = timedelta(seconds=round((self.n_steps - step) * mean_seconds))
            self.say(
                step,
                f"loss {loss:.4f}",
                f"lr {lr:.2e}",
                f"grad {grad_norm:.2f}",
                f"{tokens_per_s:,.0f} tok/s",
                *([f"{mfu:.1%} of peak"] if mfu else []),
                f"{memory_gib:.2f} GiB",
                f"padding {padding:.1%}",
                f"{seconds:.2f} s",
                f"{to_go} to go",
            )
        if time.monotonic() - self.drawn > 30:
            self.draw()

    def bad_step(
        self, step: int, loss: float, grad_norm: float, dataset: Dialogs, batch: list[int]
    ) -> None:
        """A step that was skipped, with the samples in it."""
        what = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        if self.is_rank0:
            self.write(step=step, bad=what, ids=[dataset.row(i).get("id") for i in batch])
        self.bar.update()
        self.say(step, f"skipped: {what}; its samples are in log.jsonl")

    def grey(self, step: int, names: list[str]) -> None:
        """Samples of a step whose picture did not decode."""
        self.write(step=step, grey=names)
        shown = "; ".join(names[:3])
        if len(names) > 3:
            shown += f" and {len(names) - 3} more, in log.jsonl"
        self.say(step, f"{len(names)} samples without their picture, which teach nothing: {shown}")

    def evaluation(self, step: int, loss: float | None) -> None:
        """The held-out loss after `step` steps."""
        if loss is None:
            self.say(step, "no held-out loss: none of its pictures can be read")
            return
        self.write(step=step, val_loss=loss)
        self.held_out.append((step, loss))
        self.say(step, f"held-out loss {loss:.4f}")
        self.draw()

    def draw(self) -> None:
        """Draw loss.png anew."""
        self.drawn = time.monotonic()
        if not self.is_rank0:
            return
        try:
            draw_curves(self.out / "loss.png", f"stage {self.stage}", self.train, self.held_out)
        except OSError as error:  # a picture is not worth a run
            print0(f"loss.png was not drawn: {one_line(error)}")

    def close(self) -> None:
        self.draw()
        self.bar.close()
        if self.board:
            self.board.close()


# --- 3. held out ----------------------------------------------------------------------------------
# in: the model, a held-out file; out: its loss, answers in samples.jsonl


def drop_gathered(model: Qilin) -> None:
    """After a forward without backward the root keeps its parameters whole (and blocks that stay
    gathered keep theirs): free them."""
    assert isinstance(model, FSDPModule), "training shards its model"
    model.reshard()


@torch.no_grad()
def held_out_loss(
    model: Qilin, dataset: Dialogs, micro_batch_size: int, workers: int, device: torch.device
) -> float | None:
    """Held-out loss: mean over all labelled tokens of the file whose pictures decode; None where
    there is none.

    workers: processes a rank that decode pictures ahead, as in training. Every rank takes its share
    and as many forward passes. ValueError, on all ranks, when a row can no longer be read.
    """
    model.eval()
    totals = {"ce_sum": 0.0, "targets": 0.0, "grey": 0.0}
    # read once, in the end: the GPU is not waited for before
    ce_sum = torch.zeros((), dtype=torch.float64, device=device)
    order = np.argsort(-dataset.lengths, kind="stable").tolist()
    micro_batches = cut_batch(order, dist.get_rank(), dist.get_world_size(), micro_batch_size)
    for batch in load_ahead(dataset, micro_batches, workers):
        _, failure = agree(check_batches, [batch])
        if failure:
            drop_gathered(model)
            raise ValueError(failure.line)
        ce_sum += model(**to_device(batch, device), reduction="sum")
        counted = count([batch])
        totals["targets"] += counted["targets"]
        totals["grey"] += counted["grey"]
    drop_gathered(model)
    model.train()
    totals["ce_sum"] = ce_sum.item()
    totals = sum_over_ranks(totals)
    if totals["grey"]:
        print0(f"    {int(totals['grey'])} held-out samples without their picture are left out")
    if not totals["targets"]:
        return None
    return totals["ce_sum"] / totals["targets"]


def pick_held_out(dataset: Dialogs, n: int) -> tuple[list[dict], list[torch.Tensor]]:
    """(n rows, the same each time; the pictures of their first questions, grey where a file is
    gone)."""
    rows = []
    pictures = []
    for i in np.random.default_rng(0).permutation(len(dataset))[:n]:
        row = dataset.row(i)
        n_pictures = count_images(row["conversations"][:1])
        found, _ = dataset.pictures(row, n_pictures)
        rows.append(row)
        pictures += found
    return rows, pictures


def answer_held_out(
    model: Qilin,
    dataset: Dialogs,
    *,
    template: str,
    n_samples: int,
    step: int,
    out: Path,
    device: torch.device,
) -> None:
    """Greedy answers to the first questions of some held-out rows, the same each time, into
    samples.jsonl. All ranks answer all and step together."""
    picked, failure = agree(pick_held_out, dataset, n_samples)
    if failure:
        raise ValueError(failure.line)
    rows, pictures = picked
    if not rows:
        return
    prompts = []
    for row in rows:
        question = row["conversations"][:1]
        prompts.append(encode_prompt(question, dataset.tokenizer, dataset.n_image_tokens, template))
    pixels = torch.stack(pictures) if pictures else None

    def all_ended(ended):
        # a rank that stopped alone would leave the others waiting in an all-gather
        is_going_on = float(not all(ended))
        return sum_over_ranks({"going on": is_going_on})["going on"] == 0

    model.eval()
    # compiled blocks would be compiled anew for each length of the cache
    with torch.compiler.set_stance("force_eager"):
        answers = answer_ids(model, prompts, pixels, max_new_tokens=64, stop=all_ended)
    drop_gathered(model)
    model.train()
    if dist.get_rank() == 0:
        write_answers(
            out / "samples.jsonl", step, rows, list(map(dataset.tokenizer.decode, answers))
        )


def write_answers(path: Path, step: int, rows: list[dict], answers: list[str]) -> None:
    """Add answers to held-out questions to samples.jsonl, and print them."""
    with open(path, "a", encoding="utf-8") as file:
        for row, answer in zip(rows, answers, strict=True):
            question = row["conversations"][0]["value"]
            truth = row["conversations"][1]["value"]
            entry = {
                "step": step,
                "id": row.get("id"),
                "question": question,
                "answer": answer,
                "truth": truth,
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            asked = question.replace("<image>", "").strip()
            print0(f"    {asked}  ->  {answer}  (truth: {truth})")


# --- 4. run.json ----------------------------------------------------------------------------------


def git_commit() -> str | None:
    """The commit of this code, where it lies in a git repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def write_run_json(
    out: Path,
    *,
    arguments: dict[str, object],
    n_params: dict[str, int],
    data: dict[str, str],
    start: int,
) -> None:
    """run.json: what was run, with what, on what. n_params: all, and those trained; data: sha256 of
    each file."""
    described = {}
    for name, value in arguments.items():
        described[name] = str(value) if isinstance(value, Path) else value
    content = {
        "command": sys.argv,
        "arguments": described,
        "commit": git_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "world_size": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "parameters": n_params,
        "started_at_step": start,
        "data": data,
    }
    write_json(out / "run.json", content)
