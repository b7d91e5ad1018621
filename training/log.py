"""What one sees of a run: a line a step, log.jsonl, loss.png redrawn as it runs, held-out loss, answers to held-out questions, run.json. All from rank 0."""

import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections import deque
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm

from common.files import one_line, write_json, write_text
from model_io.tokens import count_images, encode_prompt
from qilin_min import Qilin, answer_ids
from training.batches import Dialogs, check_batches, count, cut_batch, load_ahead, to_device
from training.costs import GIB
from training.ranks import agree, print0, sum_over_ranks


def draw_curves(path, title, train, held_out):
    """loss.png: training loss a step (thin, and its running mean), held-out loss as dots; [(step, loss)] each, loss on a log scale."""
    width, height, left, top, right, bottom = 800, 480, 70, 40, 780, 440
    image = Image.new(
        "RGB", (width * 2, height * 2), "white"
    )  # drawn twice as large, then halved: smooth lines
    pen = ImageDraw.Draw(image)
    points = [p for p in train + held_out if math.isfinite(p[1])]
    if not points:
        return
    x_max = max(1, max(step for step, _ in points))
    low, high = (f(max(loss, 1e-6) for _, loss in points) for f in (min, max))
    low, high = low / 1.1, high * 1.1

    def at(step, loss):
        x = left + (right - left) * step / x_max
        y = bottom - (bottom - top) * math.log(min(max(loss, low), high) / low) / math.log(
            high / low
        )
        return 2 * x, 2 * y

    ticks = [
        d * 10.0**e
        for e in range(-7, 10)
        for d in (range(1, 10) if high / low < 6 else (1, 2, 5) if high / low < 200 else (1,))
        if low <= d * 10.0**e <= high
    ]
    for loss in ticks or [low, high]:
        pen.line((*at(0, loss), *at(x_max, loss)), fill="#e4e4e4", width=2)
        pen.text(
            (2 * left - 12, at(0, loss)[1]),
            f"{loss:.3g}",
            fill="#444444",
            anchor="rm",
            font_size=24,
        )
    for step in sorted({round(x_max * k / 5) for k in range(6)}):
        pen.text(
            (at(step, low)[0], 2 * bottom + 12),
            f"{step}",
            fill="#444444",
            anchor="mt",
            font_size=24,
        )
    smooth, total, weight = (
        [],
        0.0,
        0.0,
    )  # an exponential mean that starts without a bias to its first value
    for step, loss in train:
        if math.isfinite(loss):
            total, weight = 0.95 * total + loss, 0.95 * weight + 1
            smooth.append((step, total / weight))
    for line, color, thick in ((train, "#bcd3ee", 2), (smooth, "#1f5fa8", 5)):
        line = [at(*p) for p in line if math.isfinite(p[1])]
        if len(line) > 1:
            pen.line(line, fill=color, width=thick)
    for x, y in (at(*p) for p in held_out):
        pen.ellipse((x - 9, y - 9, x + 9, y + 9), fill="#d2452d")
    pen.text(
        (2 * left, 2 * top - 16),
        f"{title}: loss by step (log scale), blue training, red held out",
        fill="#222222",
        anchor="ls",
        font_size=28,
    )
    partial = path.with_name(path.name + ".partial")
    image.resize((width, height), Image.Resampling.LANCZOS).save(partial, format="PNG")
    partial.rename(path)


class Log:
    """log.jsonl, loss.png and the printed lines, all from rank 0. A run that goes on at a step drops what was logged after it."""

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
        self.out = out
        self.stage = stage
        self.n_steps = n_steps
        self.log_every = log_every
        self.peak_flops = peak_flops
        self.train = []
        self.held_out = []
        self.is_rank0 = dist.get_rank() == 0
        self.seconds = deque(maxlen=50)
        self.board = None
        if self.is_rank0:
            for name in ("log.jsonl", "samples.jsonl"):
                self.truncate(out / name, start)
            self.file = open(out / "log.jsonl", "a", encoding="utf-8")
            if has_tensorboard:
                try:
                    from torch.utils.tensorboard import SummaryWriter
                except ImportError:
                    raise ValueError(
                        "--tensorboard needs a package more: pip install tensorboard"
                    ) from None
                self.board = SummaryWriter(out / "tensorboard", purge_step=start)
        self.bar = tqdm(
            total=n_steps,
            initial=start,
            desc=f"stage {stage}",
            unit="step",
            disable=None if self.is_rank0 else True,
        )
        self.drawn = time.monotonic()

    def truncate(self, path, start):
        """Keep the lines of steps up to `start`; what is said at a step before it is trained (held-out loss, samples) is said again."""
        kept = []
        for line in (
            path.read_text(encoding="utf-8", errors="replace").split("\n")
            if start and path.is_file()
            else ()
        ):
            try:
                entry = json.loads(line)
                is_kept = (
                    entry["step"] <= start
                    if "seconds" in entry or "bad" in entry or "grey" in entry
                    else entry["step"] < start
                )
                (
                    float(entry.get("loss", 0)),
                    float(entry.get("val_loss", 0)),
                    entry["loss" if "seconds" in entry else "step"],
                )
            except (
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                RecursionError,
            ):  # cut short by a kill, or damaged
                continue
            if is_kept:
                kept.append(line + "\n")
                if "seconds" in entry:
                    self.train.append((entry["step"], entry["loss"]))
                elif "val_loss" in entry:
                    self.held_out.append((entry["step"], entry["val_loss"]))
        write_text(path, "".join(kept)) if kept or path.name == "log.jsonl" else path.unlink(
            missing_ok=True
        )

    def write(self, **entry):
        if self.is_rank0:
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self.file.flush()
            for name, value in entry.items() if self.board else ():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, entry["step"])

    def step(self, step, loss, lr, grad_norm, seconds, n, n_flops, device):
        """One line for step number `step` (1 is the first). n: what count() summed; n_flops: of plan.flops, for the whole step."""
        memory = (
            torch.cuda.max_memory_allocated()
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        mfu = n_flops / seconds / self.peak_flops if self.peak_flops else None
        entry = dict(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_s=n["tokens"] / seconds,
            padding=1 - n["tokens"] / n["slots"],
            memory_gib=memory / GIB,
            mfu=mfu,
            n_targets=int(n["targets"]),
            seconds=seconds,
        )
        self.write(**entry)
        self.train.append((step, loss))
        self.seconds.append(seconds)
        self.bar.update()
        if step % self.log_every == 0 or step in (1, self.n_steps):
            eta = timedelta(
                seconds=round((self.n_steps - step) * sum(self.seconds) / len(self.seconds))
            )
            print0(
                f"step {step}/{self.n_steps} | loss {loss:.4f} | lr {lr:.2e} | grad {grad_norm:.2f} | {entry['tokens_per_s']:,.0f} tok/s | "
                + (f"{mfu:.1%} of peak | " if mfu else "")
                + f"{entry['memory_gib']:.2f} GiB | padding {entry['padding']:.1%} | {seconds:.2f} s | {eta} to go"
            )
        if time.monotonic() - self.drawn > 30:
            self.draw()

    def bad_step(self, step, loss, grad_norm, dataset, batch):
        """A step that was skipped, with the samples in it."""
        if self.is_rank0:
            self.write(
                step=step,
                bad=f"loss {loss:.4g}, gradient norm {grad_norm:.4g}",
                ids=[dataset.row(i).get("id") for i in batch],
            )
        self.bar.update()
        print0(
            f"step {step}/{self.n_steps} | skipped: loss {loss:.4g}, gradient norm {grad_norm:.4g}; its samples are in log.jsonl"
        )

    def grey(self, step, names):
        self.write(step=step, grey=names)
        print0(
            f"step {step}/{self.n_steps} | {len(names)} samples without their picture, which teach nothing: {'; '.join(names[:3])}"
            + f" and {len(names) - 3} more, in log.jsonl" * (len(names) > 3)
        )

    def evaluation(self, step: int, loss: float | None) -> None:
        if loss is None:
            return print0(
                f"step {step}/{self.n_steps} | no held-out loss: none of its pictures can be read"
            )
        self.write(step=step, val_loss=loss)
        self.held_out.append((step, loss))
        print0(f"step {step}/{self.n_steps} | held-out loss {loss:.4f}")
        self.draw()

    def draw(self):
        self.drawn = time.monotonic()
        if self.is_rank0:
            try:
                draw_curves(
                    self.out / "loss.png",
                    f"stage {self.stage}",
                    self.train,
                    self.held_out,
                )
            except OSError as error:  # a picture is not worth a run
                print0(f"loss.png was not drawn: {one_line(error)}")

    def close(self):
        self.draw()
        self.bar.close()
        if self.board:
            self.board.close()


@torch.no_grad()
def held_out_loss(
    model: Qilin, dataset: Dialogs, micro_batch_size: int, device: torch.device
) -> float | None:
    """Held-out loss: mean over all labelled tokens of the file whose pictures decode; None where there is none. Every rank takes its share and as many
    forward passes. ValueError, on all ranks, when a row can no longer be read."""
    model.eval()
    totals = {"ce_sum": 0.0, "targets": 0, "grey": 0}
    order = np.argsort(-dataset.lengths, kind="stable").tolist()
    micro_batches = cut_batch(order, dist.get_rank(), dist.get_world_size(), micro_batch_size)
    for batch in load_ahead(dataset, micro_batches, 0):
        if error := agree(check_batches, [batch])[1]:
            model.reshard()
            raise ValueError(error.line)
        totals["ce_sum"] += float(model(**to_device(batch, device), reduction="sum"))
        for name in ("targets", "grey"):
            totals[name] += count([batch])[name]
    model.reshard()  # after a forward without backward the root keeps its parameters whole (and blocks that stay gathered keep theirs)
    model.train()
    totals = sum_over_ranks(totals, device)
    if totals["grey"]:
        print0(f"    {int(totals['grey'])} held-out samples without their picture are left out")
    return totals["ce_sum"] / totals["targets"] if totals["targets"] else None


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
    """Greedy answers to the first questions of some held-out rows, the same each time, into samples.jsonl. All ranks answer all and step together."""

    def read():
        rows = [
            dataset.row(i) for i in np.random.default_rng(0).permutation(len(dataset))[:n_samples]
        ]
        return rows, [
            picture
            for row in rows
            for picture in dataset.pictures(row, count_images(row["conversations"][:1]))[0]
        ]  # grey where a file is gone

    (rows, pictures), error = agree(read)
    if error:
        raise ValueError(error.line)
    if not rows:
        return
    model.eval()
    questions = [row["conversations"][:1] for row in rows]
    prompts = [
        encode_prompt(question, dataset.tokenizer, dataset.n_image_tokens, template)
        for question in questions
    ]
    pixels = torch.stack(pictures) if pictures else None

    def all_ended(
        ended,
    ):  # a rank that stopped alone would leave the others waiting in an all-gather
        return sum_over_ranks({"going on": float(not all(ended))}, device)["going on"] == 0

    answers = answer_ids(model, prompts, pixels, max_new_tokens=64, stop=all_ended)
    model.reshard()
    model.train()
    if dist.get_rank() == 0:
        with open(out / "samples.jsonl", "a", encoding="utf-8") as file:
            for row, answer in zip(rows, answers):
                question, truth = row["conversations"][0]["value"], row["conversations"][1]["value"]
                file.write(
                    json.dumps(
                        {
                            "step": step,
                            "id": row.get("id"),
                            "question": question,
                            "answer": dataset.tokenizer.decode(answer),
                            "truth": truth,
                        },
                        ensure_ascii=False,
                    )
                    + "\n"
                )
                print0(
                    f"    {question.replace('<image>', '').strip()}  ->  {dataset.tokenizer.decode(answer)}  (truth: {truth})"
                )


def write_run_json(
    out: Path,
    *,
    arguments: dict[str, object],
    n_params: dict[str, int],
    data: dict[str, str],
    start: int,
) -> None:
    """run.json: what was run, with what, on what. data: sha256 of each file; n_params: all, and those trained."""
    try:
        commit = (
            subprocess.run(
                ["git", "rev-parse", "HEAD"],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
            ).stdout.strip()
            or None
        )
    except OSError:  # no git on this machine
        commit = None
    write_json(
        out / "run.json",
        {
            "command": sys.argv,
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()},
            "commit": commit,
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
        },
    )
