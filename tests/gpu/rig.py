"""One training step of rank 0, alone or of eight that are played, through train.py's own pieces:
shard_model, backward, build_optimizer, clipping.

What eight ranks send each other is played by torch's "fake" process group: it copies this rank's
part to where the others' would be, so that memory and computing are those of a rank of eight, and
links cost nothing.
"""

import gc
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tools.measure_step import Watch
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from gpu.expected import TRAINED, StepShape
from gpu.timing import wait_for
from model_io.lowbit import QuantizedLinear, add_lora, quantize_linears
from qilin_min import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    Qilin,
    QilinConfig,
    count_image_positions,
    count_labels,
)
from training.ranks import setup_distributed


def play_ranks(n: int, device: torch.device) -> None:
    """Join a group of one process as train.py does, or play the first of n."""
    if n == 1:
        setup_distributed()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("fake", rank=0, world_size=n, store=FakeStore())


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.no_grad()
def draw_weights(params: Iterable[torch.nn.Parameter]) -> None:
    """Small random numbers: zeros, or what is no number, would take less power, and a GPU would run
    faster."""
    for param in params:
        local: Any = param.to_local() if hasattr(param, "to_local") else param
        if local.is_floating_point():
            local.normal_(0, 0.02)
        else:
            local.random_(-100, 100)


def give_weights(model: Qilin, device: torch.device) -> None:
    """Memory and numbers for a model that was built on the meta device."""
    model._apply(lambda tensor: torch.empty_like(tensor, device=device))
    draw_weights(model.parameters())
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.scale.fill_(2e-4)


def build(shape: StepShape, config: QilinConfig, device: torch.device) -> Qilin:
    """The sharded model of a step, its weights random."""
    with torch.device("meta"):
        model = Qilin(config)
        if shape.quantize:
            quantize_linears(model, bits=int(shape.quantize.removeprefix("int")))
        if shape.lora:
            add_lora(model, shape.lora, alpha=2.0 * shape.lora)
    model = train.shard_model(
        model, device, TRAINED[shape.trains], compute_dtype(device), is_kept=shape.is_kept
    )
    give_weights(model, device)
    return model.train()


def make_batch(shape: StepShape, config: QilinConfig) -> dict[str, Any]:
    """Rows of a picture and words, the last of which are labelled, as the loader gives them."""
    ids = torch.randint(3, config.text.vocab_size, (shape.rows, shape.tokens))
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -shape.n_labels :] = ids[:, -shape.n_labels :]
    ids[:, 1 : 1 + config.n_image_tokens] = IMAGE_TOKEN_INDEX
    size = config.vision.image_size
    batch = {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.randn(shape.rows, 3, size, size),
    }
    if torch.cuda.is_available():
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    counted = {"n_image_positions": count_image_positions(ids), "n_labels": count_labels(labels)}
    return {**batch, **counted}


@dataclass
class Stepper:
    """A model and all that a step of it needs."""

    shape: StepShape
    run: Any
    optimizer: torch.optim.Optimizer
    trained: list[torch.nn.Parameter]
    parts: list[dict[str, Any]]

    def step(self) -> None:
        """As train.train() does it: one wait for the GPU, at the end."""
        n_targets = self.shape.rows * self.shape.n_labels * self.shape.n_micro_batches
        loss = train.backward(self.run, self.parts, n_targets)
        norm: Any = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        torch.stack((loss.float(), norm.float())).tolist()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def prepare(shape: StepShape, config: QilinConfig, device: torch.device) -> Stepper:
    """All before the first step."""
    torch.manual_seed(0)
    model = build(shape, config, device)
    optimizer = train.build_optimizer(model, lr=1e-5, weight_decay=0.0)
    cut = SimpleNamespace(n_checkpointed=lambda slots: shape.n_checkpointed)
    return Stepper(
        shape=shape,
        # what backward() needs of a Run
        run=SimpleNamespace(model=model, cut=cut, device=device),
        optimizer=optimizer,
        trained=[param for param in model.parameters() if param.requires_grad],
        parts=[make_batch(shape, config) for _ in range(shape.n_micro_batches)],
    )


@dataclass
class Measured:
    """Of a step: bytes at its peak, bytes that torch holds of the GPU at it, seconds."""

    peak: float
    reserved: float
    seconds: float


def measure(shape: StepShape, config: QilinConfig, device: torch.device, n_timed: int) -> Measured:
    """Steps of one shape, the first of which brings Adam's moments; nothing is left behind."""
    clean_up(device)
    with peak_meter(device) as peak:
        stepper = prepare(shape, config, device)
        for _ in range(2):
            stepper.step()
    seconds = statistics.median(timed_step(stepper, device) for _ in range(n_timed))
    measured = Measured(peak.bytes, peak.reserved, seconds)
    del stepper
    clean_up(device)
    return measured


def timed_step(stepper: Stepper, device: torch.device) -> float:
    """Seconds of a step, after weights are drawn anew: the fake group leaves sums of gradients as
    they lie in memory, and the last step may have made the weights no numbers."""
    draw_weights(stepper.trained)
    wait_for(device)
    tic = time.perf_counter()
    stepper.step()
    wait_for(device)
    return time.perf_counter() - tic


def clean_up(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class Peak:
    """Bytes given away at most, and bytes that torch held of the GPU then."""

    bytes: float = 0.0
    reserved: float = 0.0


@contextmanager
def peak_meter(device: torch.device) -> Iterator[Peak]:
    """Fills in the peak of what is done inside: by torch's allocator; on a CPU, which has none that
    counts, by the storages that operations make."""
    peak = Peak()
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        wait_for(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        peak.reserved = torch.cuda.max_memory_reserved(device)
        return
    with Watch() as watch:
        yield peak
    peak.bytes = max(watch.peaks.values())
