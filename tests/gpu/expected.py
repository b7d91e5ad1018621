"""What a GPU should reach, computed beforehand from the model's sizes and the machine's own peaks.

Operations and memory are those of training/costs.py, which tests hold to trackers and counters.
Time is a roofline: operations by what a large product reaches, bytes by what a copy reaches, one
after the other: no step is faster, and REACHED says how near one is expected to come.

    PYTHONPATH=.:tests python -m gpu.expected    what is expected of an A100, an H100, an H200

In the formulas: C hidden size, F MLP width, L blocks, T tokens of a row, slots rows x T, e bytes of
a number in compute.
"""

from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from qilin_min import LOSS_CHUNK, QilinConfig, TextConfig, VisionConfig
from training.batches import all_batches
from training.costs import GIB, Machine, Sizes, count_sizes, flops, micro_batch_traffic, step_memory
from training.plan import (
    LLAMA_SIZES,
    PAPER_TOWER,
    Fit,
    Samples,
    choose_fit,
    known_tflops,
    micro_batch_slots,
    paper_samples,
)

TRAINED = {1: ("mm_projector",), 2: ("mm_projector", "llm"), "lora": ("mm_projector", "lora")}


# --- 1. models ------------------------------------------------------------------------------------


def llama(hidden_size: int, intermediate_size: int, n_layers: int, n_heads: int) -> TextConfig:
    return TextConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        max_position_embeddings=4096,
    )


# with the paper's tower; 13B's proportions and head size, so that shares of time are alike
MODELS = {
    "13B": LLAMA_SIZES["13B"],
    "7B": LLAMA_SIZES["7B"],
    "3B": llama(3072, 8192, 24, 24),
    "1B": llama(2048, 5504, 20, 16),
    "0.3B": llama(1024, 2752, 16, 8),
}
# of a dry run: everything in it is there, and a CPU computes it in a moment
TINY = QilinConfig(
    TextConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=4096,
    ),
    VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    ),
)


def config_of(name: str) -> QilinConfig:
    """Of a row of MODELS, or TINY."""
    if name == "tiny":
        return TINY
    return QilinConfig(MODELS[name], PAPER_TOWER)


@cache
def sizes_of(
    model: str, trains: int | str, lora: int = 0, quantize: str | None = None, e: int = 2
) -> Sizes:
    """count_sizes() of a row of MODELS, counted once: a model of 13B takes a moment to build."""
    # numbers of two bytes are a GPU's, whose norms are one kernel
    return count_sizes(config_of(model), TRAINED[trains], lora, quantize, e, is_fused=e == 2)


# --- 2. memory: which steps are measured, and what the plan says of them --------------------------


@dataclass(frozen=True)
class StepShape:
    """A training step of rank 0: what is trained, and how it is cut."""

    what: str
    model: str
    # 1 or 2; "lora": stage 2 with adapters
    trains: int | str
    rows: int
    tokens: int
    n_checkpointed: int
    lora: int = 0
    quantize: str | None = None
    n_micro_batches: int = 1
    is_kept: bool = False
    # labelled tokens of a row
    n_labels: int = 32

    @property
    def slots(self) -> int:
        return self.rows * self.tokens

    def sizes(self, e: int) -> Sizes:
        """e: bytes of a number in compute."""
        return sizes_of(self.model, self.trains, self.lora, self.quantize, e)

    def peak(self, n_shards: int, e: int) -> float:
        """Bytes that the plan expects at the peak."""
        return step_memory(
            self.sizes(e),
            n_shards,
            self.slots,
            self.n_checkpointed,
            n_labels=min(self.rows * self.n_labels, LOSS_CHUNK),
            is_kept=self.is_kept,
            is_accumulating=self.n_micro_batches > 1,
        ).peak


def own_shapes(model: str, is_dry: bool) -> list[StepShape]:
    """Of one GPU alone: the four that the plan must know, at a size that one GPU holds whole."""
    if is_dry:
        tiny = dict(model="tiny", rows=4, tokens=64, n_labels=16)
        return [
            StepShape("stage 1", trains=1, n_checkpointed=0, **tiny),
            StepShape("stage 2", trains=2, n_checkpointed=0, **tiny),
            StepShape("stage 2, all recomputed", trains=2, n_checkpointed=3, **tiny),
            StepShape(
                "LoRA on int8", trains="lora", n_checkpointed=0, lora=4, quantize="int8", **tiny
            ),
        ]
    n_blocks = MODELS[model].num_hidden_layers
    return [
        StepShape("stage 1", model, trains=1, rows=4, tokens=704, n_checkpointed=0),
        StepShape("stage 2", model, trains=2, rows=4, tokens=704, n_checkpointed=0),
        StepShape(
            "stage 2, all recomputed",
            model,
            trains=2,
            rows=16,
            tokens=704,
            n_checkpointed=n_blocks,
        ),
        StepShape(
            "LoRA on int8",
            # the base in 8 bits is a quarter of what training it whole takes
            "13B" if model in ("3B", "7B") else model,
            trains="lora",
            rows=4,
            tokens=704,
            n_checkpointed=20 if model in ("3B", "7B") else 0,
            lora=64,
            quantize="int8",
        ),
    ]


def shapes_of_eight(is_dry: bool) -> list[StepShape]:
    """Of rank 0 of 8 that share the true 13B: by the plan 48.9, 51.6, 31.6, 38.3 and 46.0 GiB."""
    if is_dry:
        tiny = dict(model="tiny", rows=4, tokens=64, n_labels=16)
        return [
            StepShape("stage 2", trains=2, n_checkpointed=0, n_micro_batches=2, **tiny),
            StepShape("stage 1", trains=1, n_checkpointed=3, is_kept=True, **tiny),
        ]
    big = dict(model="13B")
    return [
        StepShape(
            "stage 2, nothing recomputed, 2 micro-batches",
            **big,
            trains=2,
            rows=4,
            tokens=704,
            n_checkpointed=0,
            n_micro_batches=2,
        ),
        StepShape(
            "stage 2, all recomputed, blocks kept gathered",
            **big,
            trains=2,
            rows=4,
            tokens=690,
            n_checkpointed=40,
            is_kept=True,
        ),
        StepShape(
            "stage 2, all recomputed", **big, trains=2, rows=16, tokens=704, n_checkpointed=40
        ),
        StepShape("stage 1", **big, trains=1, rows=4, tokens=1500, n_checkpointed=0),
        StepShape(
            "LoRA of 64", **big, trains="lora", rows=8, tokens=690, n_checkpointed=0, lora=64
        ),
    ]


def largest_model(gpu_bytes: float) -> str:
    """The largest of MODELS but 13B that this memory holds whole with its gradients and moments and
    a micro-batch of 4, as the plan reckons."""
    machine = Machine(1, gpu_bytes)
    names = [name for name in MODELS if name != "13B"]
    for name in names:
        shape = StepShape("", name, trains=2, rows=4, tokens=704, n_checkpointed=0)
        all_blocks = MODELS[name].num_hidden_layers
        if replace(shape, n_checkpointed=all_blocks).peak(1, 2) <= machine.budget:
            return name
    return names[-1]


# --- 3. time: a roofline --------------------------------------------------------------------------


@dataclass
class Rates:
    """What a GPU reaches, a second."""

    peak: float  # operations, bf16, by its data sheet
    gemm: float  # operations, in a large product
    bandwidth: float  # bytes, in a large copy
    links: float = 200e9  # bytes to and from other GPUs


# by data sheet, and what large products and copies have been seen to reach elsewhere: for figures
# on paper alone; on a GPU its own are measured
PAPER_RATES = {
    "A100": Rates(peak=312e12, gemm=270e12, bandwidth=1.75e12),
    "H100": Rates(peak=989e12, gemm=690e12, bandwidth=3.0e12),
    "H200": Rates(peak=989e12, gemm=690e12, bandwidth=4.2e12),
}
# flash attention beside a large product, forward and backward: FlashAttention-2, arXiv 2307.08691,
# figures 4 and 5: on an A100 190 to 225 and 150 to 200 TFLOPS
ATTENTION_SHARE = 0.65
# of a roofline's rate, what a step is expected to reach: products of a block's shapes fill the
# multiprocessors less evenly than a large one, and there are gaps between kernels. An assumption
# until a GPU has spoken
REACHED = 0.85


def peak_of(gpu_name: str) -> float | None:
    """Operations a second by the data sheet, None for a GPU that the plan does not know."""
    tflops = known_tflops(gpu_name)
    return None if tflops is None else tflops * 1e12


def rates_of(figures: dict[str, Any], is_dry: bool) -> Rates:
    """Of this machine, as its first step measured it; of an A100 on paper where that was not run,
    and in a dry run, whose CPU nobody asks about."""
    name = figures.get("gpu_name") or ""
    kind = next((kind for kind in PAPER_RATES if kind in name), "A100")
    rates = replace(PAPER_RATES[kind])
    if is_dry:
        return rates
    rates.peak = peak_of(name) or rates.peak
    if "gemm_bf16_tflops" in figures:
        rates.gemm = figures["gemm_bf16_tflops"] * 1e12
    if "bandwidth_gb_s" in figures:
        rates.bandwidth = figures["bandwidth_gb_s"] * 1e9
    return rates


@dataclass
class Parts:
    """Seconds by kind."""

    gemm: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    copies: float = 0.0  # of gathered weights to where they are used
    optimiser: float = 0.0

    @property
    def total(self) -> float:
        return sum(astuple(self))

    def plus(self, other: "Parts") -> "Parts":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Parts(*(mine + its for mine, its in pairs))


def elementwise_bytes(sizes: Sizes, is_compiled: bool) -> tuple[float, float]:
    """(forward, backward) bytes that a block's element-wise operations read and write a token.

    Counted operation by operation on LlamaDecoderLayer, in numbers of width C, Q (queries), K
    (keys) and F; a kernel that adds two numbers moves three.
    """
    C = sizes.config.text.hidden_size
    F = sizes.config.text.intermediate_size
    Q = sizes.q_width
    K = sizes.kv_width
    if is_compiled:
        # each once: two norms, q and k rotated, two residuals; silu and product together
        forward = 2 * 2 * C + 2 * (Q + K) + 2 * 2 * C + 3 * F
        # two norms with the residuals' gradients (4), rotated back, sums of q k v and of gate up;
        # gate, up and a gradient in, two out
        backward = 2 * 4 * C + 2 * (Q + K) + 2 * 3 * C + 5 * F
        return sizes.e * forward, sizes.e * backward

    norms = 2 * 2 * C
    # x * cos 2, -x2 1, cat 2, * sin 2, sum 3
    rotated = 10 * (Q + K)
    residuals = 2 * 3 * C
    # silu 2, product 3
    gate = 5 * F
    forward = norms + rotated + residuals + gate

    # x and a gradient in, one out, and both again for the weight's
    norms = 2 * 5 * C
    # * cos 2, * sin 2, -x2 1, cat 2, sum 3
    rotated = 10 * (Q + K)
    # of the residuals, of q k v (2), of gate and up
    sums = (2 + 2 + 1) * 3 * C
    # silu 3, both sides of the product 6
    gate = 9 * F
    backward = norms + rotated + sums + gate
    return sizes.e * forward, sizes.e * backward


def micro_batch_parts(
    sizes: Sizes,
    rates: Rates,
    *,
    rows: int,
    tokens: int,
    n_checkpointed: int,
    n_labels: int,
    n_pictures: int,
    is_kept: bool = False,
    is_compiled: bool = False,
) -> Parts:
    """Seconds that one GPU computes on a micro-batch of rows x tokens, forward and backward."""
    slots = rows * tokens
    L = sizes.n_blocks
    lengths = np.full(rows, tokens)
    # 2 T^2 Q forward a row and block (the causal half); backward computes the scores again: 2.5
    attention_once = 2 * tokens**2 * sizes.q_width * rows
    counted_attention = 6 * L * sizes.q_width * rows * tokens**2
    needed = flops(sizes, lengths, n_pictures, n_labels) - counted_attention
    again = 2 * sizes.linear * slots * n_checkpointed
    # the loss computes its logits twice
    text = sizes.config.text
    again += 2 * text.vocab_size * text.hidden_size * n_labels

    forward, backward = elementwise_bytes(sizes, is_compiled)
    moved = slots * ((L + n_checkpointed) * forward + L * backward)
    return Parts(
        gemm=(needed + again) / rates.gemm,
        attention=(attention_once * (L * 3.5 + n_checkpointed) / (ATTENTION_SHARE * rates.gemm)),
        elementwise=moved / rates.bandwidth,
        # FSDP gathers into one buffer and copies each parameter out of it: read and written
        copies=2 * micro_batch_traffic(sizes, is_kept).gathered / rates.bandwidth,
    )


def optimiser_seconds(sizes: Sizes, rates: Rates, n_shards: int) -> float:
    """The norm reads gradients, clipping reads and writes them, AdamW reads four numbers of float32
    a parameter and writes three: 40 bytes."""
    return 40 * sizes.n_trained / n_shards / rates.bandwidth


def step_parts(
    shape: StepShape, rates: Rates, n_shards: int, e: int, is_compiled: bool = False
) -> Parts:
    """Seconds of a whole step of rank 0, collectives hidden behind it."""
    sizes = shape.sizes(e)
    total = Parts(optimiser=optimiser_seconds(sizes, rates, n_shards))
    for _ in range(shape.n_micro_batches):
        part = micro_batch_parts(
            sizes,
            rates,
            rows=shape.rows,
            tokens=shape.tokens,
            n_checkpointed=shape.n_checkpointed,
            n_labels=shape.rows * shape.n_labels,
            n_pictures=shape.rows,
            is_kept=shape.is_kept,
            is_compiled=is_compiled,
        )
        total = total.plus(part)
    return total


def step_flops(shape: StepShape, e: int) -> float:
    """Operations of a step of rank 0, nothing counted twice."""
    lengths = np.full(shape.rows * shape.n_micro_batches, shape.tokens)
    n_rows = len(lengths)
    return flops(shape.sizes(e), lengths, n_rows, n_rows * shape.n_labels)


# --- 4. stage 2 of 13B on 8 GPUs, from one block's time -------------------------------------------


@dataclass
class BlockSeconds:
    """Of one decoder block, for each token (with padding)."""

    forward: float
    forward_and_backward: float


@dataclass
class Hours:
    """What a whole stage takes."""

    hours: float
    mfu: float
    # share of its time in which the GPUs wait for each other
    waiting: float


@dataclass
class PaperStage:
    """The paper's stage 2 at 13B on 8 GPUs, cut by the plan."""

    sizes: Sizes
    world_size: int
    fit: Fit
    samples: Samples
    # of each step, slots of rank 0's micro-batches
    slots: list[list[int]]
    # rows of a rank in a full step
    n_rows: int

    def hours(self, block: BlockSeconds, rates: Rates, links: float | None = None) -> Hours:
        """Each micro-batch takes as long as its blocks and the rest compute, or as its collectives
        take where that is longer. links: bytes a second, in place of the rates'."""
        sizes = self.sizes
        is_kept = self.fit.is_kept
        traffic = micro_batch_traffic(sizes, is_kept)
        # FSDP copies what it gathered to where it is used: read and written
        copies = 2 * traffic.gathered / rates.bandwidth
        travelling = (traffic.gathered + traffic.summed) * (self.world_size - 1) / self.world_size
        moved = travelling / (links or rates.links)
        # a share of blocks x tokens is computed again, forward
        a_slot = block.forward_and_backward + self.fit.recomputed * block.forward
        # of a row but for its blocks: tower, projector and head
        n_labels = float(self.samples.n_labels.mean())
        rest = flops(sizes, np.zeros(1), 1.0, n_labels) / rates.gemm

        seconds = 0.0
        waiting = 0.0
        for slots in self.slots:
            for n in slots:
                computing = n * sizes.n_blocks * a_slot + copies
                computing += rest * self.n_rows / len(slots)
                seconds += max(computing, moved)
                waiting += max(0.0, moved - computing)
            seconds += optimiser_seconds(sizes, rates, self.world_size)
        n_labels = float(self.samples.n_labels.sum())
        lengths = self.samples.lengths
        work = flops(sizes, lengths, len(lengths), n_labels)
        return Hours(
            hours=seconds / 3600,
            mfu=work / (seconds * self.world_size * rates.peak),
            waiting=waiting / seconds,
        )


def paper_stage(memory: float, peak: float, n_samples: int | None = None) -> PaperStage:
    """Stage 2 of 13B on 8 GPUs of so many bytes and operations a second. n_samples: the first so
    many alone."""
    world_size = 8
    sizes = sizes_of("13B", trains=2)
    samples = paper_samples(2, sizes.config.n_image_tokens, 2048, "the paper")
    if n_samples:
        samples = Samples(
            samples.lengths[:n_samples],
            samples.n_labels[:n_samples],
            samples.n_pictures[:n_samples],
            samples.source,
        )
    batches = all_batches(samples.lengths, batch_size=128, epochs=1, seed=0, max_steps=0)
    machine = Machine(world_size, memory, flops=peak)
    fit = choose_fit(sizes, machine, samples.lengths, batches, at_most=16)
    assert fit, "the paper's run fits into 80 GB"
    slots = []
    for batch in batches:
        size = fit.micro_batch_size
        slots.append(micro_batch_slots(samples.lengths, batch, world_size, size))
    return PaperStage(sizes, world_size, fit, samples, slots, n_rows=128 // world_size)


def block_seconds(sizes: Sizes, rates: Rates, tokens: int, is_compiled: bool) -> BlockSeconds:
    """By the roofline, rows of so many tokens."""
    product = 2 * sizes.linear / rates.gemm
    attention = 2 * tokens * sizes.q_width / (ATTENTION_SHARE * rates.gemm)
    forward, backward = elementwise_bytes(sizes, is_compiled)
    once = product + attention + forward / rates.bandwidth
    return BlockSeconds(
        forward=once,
        forward_and_backward=(
            once + (sizes.passes - 1) * product + 2.5 * attention + backward / rates.bandwidth
        ),
    )


# --- 5. on paper ----------------------------------------------------------------------------------


def computed_table() -> str:
    """What is expected of GPUs that nobody has measured here, as Markdown."""
    lines = ["| computed | A100 80 GB | H100 80 GB | H200 141 GB |"]
    # as torch tells them
    memory = {"A100": 79 * GIB, "H100": 79 * GIB, "H200": 139 * GIB}
    for is_compiled in (False, True):
        way = "compiled" if is_compiled else "eager"
        cells = []
        for rates in PAPER_RATES.values():
            shape = StepShape("", "3B", trains=2, rows=16, tokens=690, n_checkpointed=0)
            seconds = step_parts(shape, rates, 1, 2, is_compiled).total
            mfu = step_flops(shape, 2) / seconds / rates.peak
            cells.append(f"{REACHED * mfu:.0%} (at most {mfu:.0%})")
        lines.append(f"| MFU of 3B on one GPU, {way} | {' | '.join(cells)} |")
        cells = []
        for kind, rates in PAPER_RATES.items():
            stage = paper_stage(memory[kind], rates.peak)
            block = block_seconds(stage.sizes, rates, 704, is_compiled)
            hours = stage.hours(block, rates).hours
            cells.append(f"{hours / REACHED:.1f} h (at least {hours:.1f})")
        lines.append(f"| stage 2 of 13B on 8 GPUs, {way} | {' | '.join(cells)} |")
    for shape in shapes_of_eight(is_dry=False):
        peak = shape.peak(8, e=2) / GIB
        cells = []
        for rates in PAPER_RATES.values():
            at_most = step_flops(shape, 2) / step_parts(shape, rates, 8, 2).total / 1e12
            cells.append(f"{REACHED * at_most:.0f} TFLOPS")
        cut = f"{shape.what}, {shape.rows} x {shape.tokens}"
        lines.append(f"| 13B, rank 0 of 8, {cut}: {peak:.1f} GiB, eager | {' | '.join(cells)} |")
    lines.insert(1, "| --- | --- | --- | --- |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(computed_table())
