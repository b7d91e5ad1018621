"""A checkpoint that is written while training goes on: how long a step waits for the copy, how much
slower steps are meanwhile, how much host memory it takes."""

import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from gpu.table import Context, Row
from gpu.timing import wait_for
from qilin_min import Qilin, QilinConfig, TextConfig, VisionConfig
from train import build_optimizer, shard_model
from training.checkpoints import Checkpoints, Progress
from training.ranks import setup_distributed

TOWER = VisionConfig(64, 128, 2, 2, 56, 14)
# 1 billion parameters: 12 GB with Adam's moments
LARGE = TextConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=18,
    num_attention_heads=16,
)
TINY = TextConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=2,
    num_attention_heads=4,
)


def sizes_for(context: Context) -> TextConfig:
    """LARGE, or as much of it as the disk holds three checkpoints of."""
    if context.is_dry:
        return TINY
    bytes_a_block = 12 * 50.6e6
    n_blocks = int(shutil.disk_usage(context.out).free / (3 * bytes_a_block))
    return replace(LARGE, num_hidden_layers=max(1, min(LARGE.num_hidden_layers, n_blocks)))


class Training:
    """Steps of a random model on random tokens, in one process."""

    def __init__(self, device: torch.device, text: TextConfig, is_tiny: bool):
        self.device = device
        with torch.device(device):
            model = Qilin(QilinConfig(text, TOWER))
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.model = shard_model(model, device, ("mm_projector", "llm"), dtype)
        self.optimizer = build_optimizer(self.model, lr=1e-5, weight_decay=0.0)
        # (samples, tokens)
        shape = (2, 64) if is_tiny else (8, 704)
        self.ids = torch.randint(3, 500, shape, device=device)

    def step(self) -> float:
        """Its seconds."""
        tic = time.perf_counter()
        self.model(self.ids, None, self.ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait_for(self.device)
        return time.perf_counter() - tic

    def n_bytes(self) -> int:
        """Of a checkpoint: weights, two moments."""
        trained = [param for param in self.model.parameters() if param.requires_grad]
        return 3 * 4 * sum(param.numel() for param in trained)


def host_peak() -> int:
    """Bytes that this process has held at its peak since forget_peak()."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmHWM"].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def checkpoint(context: Context) -> list[Row]:
    """Two checkpoints, one waited for, one not; at tiny sizes the figures promise nothing."""
    _, _, device = setup_distributed()
    training = Training(device, sizes_for(context), context.is_dry)
    checkpoints = Checkpoints(context.out, training.model, training.optimizer, {}, n_kept=1)
    for _ in range(3):
        training.step()
    alone = statistics.median(training.step() for _ in range(10))

    # the first one finds host memory, which later ones use again
    checkpoints.save(Progress(1), wait=True)
    tic = time.perf_counter()
    checkpoints.save(Progress(2), wait=True)
    waited = time.perf_counter() - tic

    forget_peak()
    before = host_peak()
    tic = time.perf_counter()
    checkpoints.save(Progress(3))
    blocked = time.perf_counter() - tic
    steps = []
    while not checkpoints.progress()["written"] and len(steps) < 2000:
        steps.append(training.step())
    meanwhile = statistics.median(steps or [training.step()])
    checkpoints.finish()
    rise = host_peak() - before

    size = training.n_bytes()
    slower = meanwhile / alone
    context.figures.update(checkpoint_blocked_s=blocked, checkpoint_gb=size / 1e9)
    is_promised = not context.is_dry
    return [
        Row(
            f"a step waits for a checkpoint of {size / 1e9:.2f} GB",
            f"less than the {waited:.2f} s until the disk has it",
            f"{blocked:.2f} s, {size / 1e9 / blocked:.1f} GB/s",
            blocked < waited if is_promised else None,
        ),
        Row(
            "steps while a checkpoint is written",
            f"at most 1.1 x a step alone ({1000 * alone:.1f} ms)",
            f"{slower:.2f} x, median of {len(steps)}",
            slower <= 1.1 if is_promised else None,
        ),
        Row(
            "host memory for it",
            f"at most the checkpoint again, {size / 2**30:.2f} GiB",
            f"{rise / 2**30:.2f} GiB more than before",
            rise <= 1.1 * size if is_promised else None,
        ),
    ]
