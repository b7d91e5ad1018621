"""What a training run needs, from its sizes alone: memory, work, time, disk.

`python train.py --stage 2 --plan --world-size 8` prints it, by the formulas of costs.py. train.py
asks the same formulas, step by step, how many blocks must recompute their activations.

1. what fits    lengths of samples, a machine -> how a batch is cut
2. samples      those of the data, or of lengths like the paper's
3. the plan     all of it in a Plan -> lines
4. this machine
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common.paper import CASE_REPORT, OA, RELEASED_ALIGNMENT, TABLE_1, TABLE_2, lengths_like
from model_io.adapters import language_folder
from model_io.load import read_checkpoint
from model_io.tokens import Tokenizer
from qilin_min import (
    LOSS_CHUNK,
    QilinConfig,
    TextConfig,
    VisionConfig,
    folder_config,
    text_config,
    vision_config,
)
from training.batches import Dialogs, all_batches
from training.costs import (
    GIB,
    RESERVE_GIB,
    SPARE_GIB,
    Machine,
    Memory,
    Sizes,
    blocks_to_checkpoint,
    checkpoint_bytes,
    count_sizes,
    flops,
    micro_batch_traffic,
    phase_peaks,
    step_memory,
)
from training.ranks import gather, together

LLAMA_SIZES = {
    "7B": TextConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    ),
    "13B": TextConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        max_position_embeddings=4096,
    ),
    "70B": TextConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    ),
}
PAPER_TOWER = VisionConfig(  # CLIP ViT-L/14-336
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
DEFAULT_GPU_GIB = 80.0
DEFAULT_TFLOPS = 312.0  # A100, bf16, dense

# what --reshard says about Fit.is_kept; None: the plan chooses
IS_KEPT = {"auto": None, "always": False, "never": True}


# --- 1. what fits ---------------------------------------------------------------------------------
# in: Sizes, Machine, lengths and batches of the samples; out: Fit


@dataclass
class Fit:
    """How a run is cut: see choose_fit()."""

    micro_batch_size: int
    is_kept: bool  # blocks stay gathered between forward and backward
    seconds: float = 0.0  # estimated, of all steps
    recomputed: float = 0.0  # share of blocks x tokens computed twice
    deepest: int = 0  # most blocks recomputing in any step


def slots_of(lengths: np.ndarray, micro_batch_size: int) -> Iterator[int]:
    """Slots of each micro-batch of one rank's samples, padded to its longest row."""
    for start in range(0, len(lengths), micro_batch_size):
        rows = lengths[start : start + micro_batch_size]
        yield int(rows.max() * len(rows))


def micro_batch_slots(
    lengths: np.ndarray, batch: list[int], world_size: int, micro_batch_size: int
) -> list[int]:
    """Slots of each micro-batch of the first rank, which gets the longest sample of every global
    batch (sorted, longest first)."""
    return list(slots_of(lengths[batch[::world_size]], micro_batch_size))


def longest_batch(batches: list[list[int]]) -> int:
    """Samples of the largest global batch."""
    return max(map(len, batches))


def sizes_to_try(n_per_gpu: int, at_most: int | None) -> list[int]:
    """Sizes of a micro-batch, the largest first, each half of the one before."""
    largest = min(at_most or n_per_gpu, n_per_gpu)
    halved = {math.ceil(largest / 2**k) for k in range(largest.bit_length() + 1)}
    return sorted(halved, reverse=True)


def choose_fit(
    sizes: Sizes,
    machine: Machine,
    lengths: np.ndarray,
    batches: list[list[int]],
    micro_batch_size: int | None = None,
    is_kept: bool | None = None,
    at_most: int | None = None,
) -> Fit | None:
    """The Fit that is done soonest among those that fit into the machine's memory, or None.

    Fewer samples at a time leave room for activations, so that fewer blocks compute theirs again
    (all of them: a third more work forward and backward than needed); but each micro-batch gathers
    the weights and sums gradients over ranks, which hides behind the computing only while there is
    enough of it. micro_batch_size, is_kept: given ones are not chosen; at_most: the largest
    micro-batch to choose.
    """
    n_per_gpu = math.ceil(longest_batch(batches) / machine.world_size)
    candidates = [micro_batch_size] if micro_batch_size else sizes_to_try(n_per_gpu, at_most)
    ways = [False, True] if is_kept is None else [is_kept]
    best = None
    for size in candidates:
        all_slots = []
        for batch in batches:
            all_slots += micro_batch_slots(lengths, batch, machine.world_size, size)
        for way in ways:
            fit = try_fit(
                sizes,
                machine,
                all_slots,
                micro_batch_size=size,
                is_kept=way,
                is_accumulating=n_per_gpu > size,
            )
            if fit is None:
                continue
            # the larger micro-batch unless the gain is real
            if best is None or fit.seconds < 0.98 * best.seconds:
                best = fit
    return best


def try_fit(
    sizes: Sizes,
    machine: Machine,
    all_slots: list[int],
    *,
    micro_batch_size: int,
    is_kept: bool,
    is_accumulating: bool,
) -> Fit | None:
    """The Fit of one way to cut the batches, or None when one of its micro-batches does not fit.
    all_slots: of each micro-batch of the run."""
    L = sizes.n_blocks
    n_shards = machine.n_shards
    # seconds a token and block, at half of the peak
    per_token = 2 * sizes.linear * sizes.passes / (0.5 * machine.flops)
    # seconds a micro-batch, for gathered weights and gradients
    traffic = micro_batch_traffic(sizes, is_kept)
    from_others = (traffic.gathered + traffic.summed) * (n_shards - 1) / n_shards
    moved = from_others / machine.bandwidth

    fit = Fit(micro_batch_size, is_kept)
    again = 0.0
    total = 0.0
    known: dict[int, int | None] = {}
    for slots in all_slots:
        if slots not in known:
            known[slots] = blocks_to_checkpoint(
                sizes,
                n_shards,
                slots,
                machine.budget,
                n_labels=LOSS_CHUNK,
                is_kept=is_kept,
                is_accumulating=is_accumulating,
            )
        n = known[slots]
        if n is None:
            return None
        fit.deepest = max(fit.deepest, n)
        again += n * slots
        total += L * slots
        fit.seconds += max(slots * per_token * (L + n / sizes.passes), moved)
    fit.recomputed = again / total
    return fit


def describe_fit(fit: Fit, n_blocks: int, n_per_gpu: int) -> str:
    """One line: how the batch is cut, and why."""
    text = f"{n_per_gpu} samples a step and GPU, {fit.micro_batch_size} at a time; "
    if fit.deepest == 0:
        text += "no block recomputes its activations"
    else:
        text += (
            f"at most {fit.deepest} of {n_blocks} blocks recompute their activations "
            f"({fit.recomputed:.0%} of their work is done twice)"
        )
    if fit.is_kept:
        text += "; blocks stay gathered between forward and backward"
    return text


def padding_share(
    lengths: np.ndarray, batches: list, world_size: int, micro_batch_size: int
) -> float:
    """Share of padding in what the GPUs compute, each micro-batch being padded to its longest
    row."""
    n_slots = 0
    for batch in batches:
        for rank in range(min(world_size, len(batch))):
            n_slots += sum(slots_of(lengths[batch[rank::world_size]], micro_batch_size))
    n_tokens = float(sum(lengths[batch].sum() for batch in batches))
    return 1 - n_tokens / n_slots


# --- 2. samples -----------------------------------------------------------------------------------
# in: data files, or nothing; out: Samples


@dataclass
class Samples:
    """What a plan knows of the data: int64 (n,), in tokens but for the pictures."""

    lengths: np.ndarray
    n_labels: np.ndarray
    n_pictures: np.ndarray
    source: str


# tokens of the system sentence, roles and a request
PROMPT = 60
# --alignment-text: what a sample of the paper's stage 1 is made of, where it has two texts
ALIGNMENT_TEXTS = {
    "draw": "of a case report one of its two texts",
    "both": "of a case report both texts, a sample each",
    "none": "PMC-OA alone, as ChiMed-VL-Alignment.jsonl is released",
}


def paper_captions(rng: np.random.Generator, alignment_text: str) -> np.ndarray:
    """int64 (n,): lengths of what stage 1 learns, by Table 1. alignment_text: of
    ALIGNMENT_TEXTS."""
    contexts = TABLE_1.texts[CASE_REPORT, "C"]
    inline = TABLE_1.texts[CASE_REPORT, "I"]
    captions = TABLE_1.texts[OA, "I"]
    if alignment_text == "none":
        return lengths_like(captions, RELEASED_ALIGNMENT, rng)
    n_contexts = contexts.n
    n_inline = inline.n
    if alignment_text == "draw":
        n_contexts = contexts.n // 2
        n_inline = inline.n - n_contexts
    drawn = [
        lengths_like(contexts, n_contexts, rng),
        lengths_like(inline, n_inline, rng),
        lengths_like(captions, captions.n, rng),
    ]
    return rng.permutation(np.concatenate(drawn))


def paper_answers(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(questions, answers), int64 (n,): lengths of what stage 2 is asked and learns, by Table 2."""
    drawn = {}
    for kind in "QA":
        of_sets = [TABLE_2.texts[source, kind] for source in TABLE_2.pairs]
        drawn[kind] = np.concatenate([lengths_like(texts, texts.n, rng) for texts in of_sets])
    order = rng.permutation(len(drawn["Q"]))
    return drawn["Q"][order], drawn["A"][order]


def paper_lengths(
    table: int, n_image_tokens: int, alignment_text: str = "draw", seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, labels) in tokens of samples like the paper's, int64 (n,): captions by its Table 1,
    questions and answers by Table 2. </s> is a label, too."""
    rng = np.random.default_rng(seed)
    if table == 1:
        labels = paper_captions(rng, alignment_text) + 1
        return n_image_tokens + PROMPT + labels, labels
    questions, answers = paper_answers(rng)
    labels = answers + 1
    return n_image_tokens + PROMPT + questions + labels, labels


def paper_samples(
    table: int, n_image_tokens: int, max_length: int, missing: str, alignment_text: str = "draw"
) -> Samples:
    """Samples like the paper's, each with a picture and cut at max_length, which leaves them a
    label. missing: the data that is not there."""
    lengths, whole = paper_lengths(table, n_image_tokens, alignment_text)
    n_over = np.maximum(lengths - max_length, 0)
    lengths = lengths - n_over
    labels = whole - n_over
    lengths = lengths[labels > 0]
    labels = labels[labels > 0]
    source = f"no data at {missing}: lengths by the paper's Table {table}"
    if table == 1:
        source += f", {ALIGNMENT_TEXTS[alignment_text]}"
    if n_over.any():
        n_cut = int(np.minimum(n_over, whole).sum())
        source += f"; {n_cut:,} labels are beyond {max_length:,} tokens"
    return Samples(lengths, labels, np.ones_like(lengths), source)


# --- 3. the plan ----------------------------------------------------------------------------------
# in: what train.py's options say; out: lines


@dataclass
class Plan:
    """What plan_lines() tells of a run."""

    stage: int
    where: str  # what sizes and lengths come from
    sizes: Sizes
    machine: Machine
    samples: Samples
    batches: list[list[int]]  # all global batches of the run
    fit: Fit | None
    would_fit: list[str]  # changes to make if it does not
    export: str  # of FINAL_FILES: what is kept in the end
    keep: int  # checkpoints kept

    @property
    def batch_size(self) -> int:
        return longest_batch(self.batches)

    @property
    def n_per_gpu(self) -> int:
        return math.ceil(self.batch_size / self.machine.world_size)

    @property
    def shown(self) -> Fit:
        """The Fit, or where there is none the one that takes least memory."""
        return self.fit or Fit(1, False, deepest=self.sizes.n_blocks, recomputed=1.0)


def plan_lines(plan: Plan) -> list[str]:
    """The plan in words."""
    return [*machine_lines(plan), *peak_lines(plan), *work_lines(plan), disk_line(plan)]


def machine_lines(plan: Plan) -> list[str]:
    """Machine, parameters, how a batch is cut."""
    sizes = plan.sizes
    machine = plan.machine
    gpus = "GPUs" if machine.world_size > 1 else "GPU"
    machine_line = (
        f"plan of stage {plan.stage} on {machine.world_size} {gpus} "
        f"of {machine.memory / GIB:.0f} GiB, {machine.flops / 1e12:.0f} TFLOPS ({plan.where})"
    )
    if machine.bandwidth != Machine.bandwidth:
        machine_line += f", {machine.bandwidth / 1e9:.0f} GB/s between them"
    trained = f"{sizes.n_trained / 1e9:.2f} of {sizes.n_all / 1e9:.2f} billion parameters trained"
    if sizes.lora:
        trained += f", LoRA of rank {sizes.lora}"
    if sizes.quantize:
        trained += f", base in {sizes.quantize}"
    cut = describe_fit(plan.shown, sizes.n_blocks, plan.n_per_gpu)
    n_idle = machine.world_size - plan.batch_size
    if n_idle > 0:
        cut += f"; more GPUs than samples a step: {n_idle:,} stand idle"
    return [machine_line, f"  {trained}", f"  {cut}"]


def peak_lines(plan: Plan) -> list[str]:
    """Memory by kind in the largest step, its peak, and what would fit if it does not."""
    slots, n_checkpointed, needed = largest_step(plan)
    n_blocks = plan.sizes.n_blocks
    lines = [
        f"memory a GPU, GiB, in the largest step (micro-batch of {slots:,} tokens with padding, "
        f"{n_checkpointed} of {n_blocks} blocks recomputing):"
    ]
    for kind in fields(needed):
        name = kind.name.replace("_", " ")
        lines.append(f"  {name:<20} {getattr(needed, kind.name) / GIB:6.1f}")

    there = plan.machine.memory / GIB
    peak = needed.peak / GIB
    spare = there - RESERVE_GIB - peak
    if plan.fit:
        verdict = f"fits, {spare:.1f} GiB to spare"
    else:
        verdict = f"DOES NOT FIT with {SPARE_GIB:.0f} GiB to spare ({spare:.1f})"
    lines.append(
        f"peak {peak:.1f} GiB a GPU of {there:.0f}; "
        f"about {RESERVE_GIB:.0f} for CUDA context, NCCL and fragmentation; {verdict}"
    )
    lines += [f"  would fit: {change}" for change in plan.would_fit]
    return [*lines, phases_line(plan, slots, n_checkpointed)]


def phases_line(plan: Plan, slots: int, n_checkpointed: int) -> str:
    """The peak of each phase of the largest step, and of what follows some steps."""
    peaks = phase_peaks(
        plan.sizes,
        plan.machine.n_shards,
        slots,
        n_checkpointed,
        n_labels=LOSS_CHUNK,
        is_kept=plan.shown.is_kept,
        is_accumulating=plan.n_per_gpu > plan.shown.micro_batch_size,
    )
    parts = [f"{name} {peak / GIB:.1f}" for name, peak in asdict(peaks).items()]
    return f"by phase, GiB: {', '.join(parts)}"


def traffic_line(plan: Plan) -> str:
    """What the GPUs gather and sum in a micro-batch."""
    traffic = micro_batch_traffic(plan.sizes, plan.shown.is_kept)
    return (
        f"a micro-batch gathers {traffic.gathered / GIB:.1f} GiB in {traffic.n_gathers} "
        f"all-gathers and sums {traffic.summed / GIB:.1f} GiB in {traffic.n_sums} reduce-scatters"
    )


def largest_step(plan: Plan) -> tuple[int, int, Memory]:
    """(slots of the largest micro-batch, blocks that recompute in it, its Memory)."""
    sizes = plan.sizes
    n_shards = plan.machine.n_shards
    micro_batch_size = plan.shown.micro_batch_size
    is_kept = plan.shown.is_kept
    is_accumulating = plan.n_per_gpu > micro_batch_size
    slots = max(
        max(
            micro_batch_slots(
                plan.samples.lengths, batch, plan.machine.world_size, micro_batch_size
            )
        )
        for batch in plan.batches
    )
    n = blocks_to_checkpoint(
        sizes,
        n_shards,
        slots,
        plan.machine.budget,
        n_labels=LOSS_CHUNK,
        is_kept=is_kept,
        is_accumulating=is_accumulating,
    )
    if n is None:
        n = sizes.n_blocks
    needed = step_memory(
        sizes,
        n_shards,
        slots,
        n,
        n_labels=LOSS_CHUNK,
        is_kept=is_kept,
        is_accumulating=is_accumulating,
    )
    return slots, n, needed


def work_lines(plan: Plan) -> list[str]:
    """Steps, padding, operations, hours, traffic."""
    sizes = plan.sizes
    machine = plan.machine
    batches = plan.batches
    lengths = plan.samples.lengths
    n_labels = plan.samples.n_labels
    n_pictures = plan.samples.n_pictures

    n_samples = sum(map(len, batches))
    n_tokens = sum(int(lengths[batch].sum()) for batch in batches)
    n_labelled = sum(int(n_labels[batch].sum()) for batch in batches)
    steps_line = (
        f"steps {len(batches):,} of {plan.batch_size} samples, {n_samples:,} samples, "
        f"{n_tokens / 1e6:,.1f} M tokens, {n_labelled / 1e6:,.1f} M of them labelled"
    )

    size = len(batches[0])
    shuffled = np.random.default_rng(0).permutation(len(lengths))
    mixed = [shuffled[start : start + size] for start in range(0, len(lengths), size)]
    micro_batch_size = plan.shown.micro_batch_size
    padding = padding_share(lengths, batches, machine.world_size, micro_batch_size)
    random_padding = padding_share(lengths, mixed, machine.world_size, micro_batch_size)
    padding_line = f"padding {padding:.1%}, in random batches it would be {random_padding:.1%}"

    work = sum(
        flops(sizes, lengths[batch], n_pictures[batch].sum(), n_labels[batch].sum())
        for batch in batches
    )
    work_line = (
        f"work {work / len(batches):.3g} FLOPs a step, {work:.3g} in all (nothing counted twice)"
    )

    # a GPU without a sample waits
    n_working = min(machine.world_size, plan.batch_size)
    hours = [work / (share * machine.flops * n_working) / 3600 for share in (0.4, 0.5, 0.6)]
    hours_line = f"hours {hours[0]:.1f} / {hours[1]:.1f} / {hours[2]:.1f} at 40 / 50 / 60 % of peak"
    more = plan.shown.recomputed / sizes.passes
    if plan.shown.deepest:
        hours_line += f", about {more:.0%} more for what is recomputed"
    waiting = plan.shown.seconds / 3600
    if waiting > 1.1 * hours[1] * (1 + more):
        hours_line += (
            f"; with {machine.bandwidth / 1e9:.0f} GB/s between GPUs at least {waiting:.1f}"
        )
    lines = [steps_line, padding_line, work_line, hours_line]
    if machine.n_shards > 1:
        lines.append(traffic_line(plan))
    return lines


def disk_line(plan: Plan) -> str:
    """Checkpoints and final weights on disk, and what writing one takes of the host's memory."""
    sizes = plan.sizes
    one = checkpoint_bytes(sizes)
    n_exported = sizes.projector if plan.export == "projector" else sizes.n_all
    final = sizes.e * n_exported
    disk = (plan.keep + 1) * one + final
    on_host = one * plan.machine.replicate
    return (
        f"disk {disk / 1e9:.1f} GB: {plan.keep} checkpoints of {one / 1e9:.1f} GB "
        f"and one being written, final weights {final / 1e9:.1f} GB; "
        f"host memory {on_host / 1e9:.1f} GB more over all ranks while one is written"
    )


@dataclass
class Change:
    """Another run than the one that does not fit."""

    words: str
    sizes: Sizes
    machine: Machine


def changes_that_fit(
    sizes: Sizes,
    machine: Machine,
    lengths: np.ndarray,
    batches: list[list[int]],
    at_most: int,
    lighter: tuple[str, ...] | None,
) -> list[str]:
    """Changes with which the largest batch, which is the first, fits: the smallest of each kind.

    lighter: what --lora would train, None where adapters are no choice.
    """
    more_gpus = []
    for k in range(1, 8):
        n = machine.world_size * 2**k
        more_gpus.append(Change(f"--world-size {n}", sizes, replace(machine, world_size=n)))
    larger_gpus = []
    for gib in (24, 40, 48, 80, 141, 192):
        if gib * GIB > machine.memory:
            larger = replace(machine, memory=gib * GIB)
            larger_gpus.append(Change(f"GPUs of {gib} GiB", sizes, larger))
    adapters = []
    if lighter:
        for words, rank, quantize in (
            ("--lora 64", 64, None),
            ("--lora 64 --quantize int8", 64, "int8"),
            ("--lora 16 --quantize int4", 16, "int4"),
        ):
            with_adapters = count_sizes(sizes.config, lighter, rank, quantize, is_fused=True)
            adapters.append(Change(words, with_adapters, machine))
    fewer_bits = []
    if sizes.block_trained == 0 and not sizes.quantize:
        fewer_bits = [Change("--quantize int8", replace(sizes, quantize="int8"), machine)]

    found = []
    for kind in (more_gpus, larger_gpus, adapters, fewer_bits):
        for change in kind:
            if choose_fit(change.sizes, change.machine, lengths, batches[:1], at_most=at_most):
                found.append(change.words)
                break
    return found


@dataclass
class PlannedWeights:
    """What train.py's options say of the weights; a default folder that is not there has the
    paper's sizes."""

    model: str | None
    base: str | None  # of a model that is an adapter
    llm: str | None
    vision: str | None
    projector_type: str | None
    size: str  # of LLAMA_SIZES, where there are no weights
    defaults: dict[str, str]  # folders of llm and vision


@dataclass
class PlannedData:
    """What train.py's options say of the data; where the default is not there it is like the
    paper's."""

    files: list[str]
    is_default: bool
    table: int  # of the paper, with the lengths of such samples
    alignment_text: str  # of ALIGNMENT_TEXTS
    max_length: int
    open_dialogs: Callable[[list[str], Tokenizer, QilinConfig], Dialogs]


def planned_config(weights: PlannedWeights) -> tuple[QilinConfig, str]:
    """(config, what it comes from)."""
    if weights.model:
        checkpoint = read_checkpoint(weights.model, llm=weights.llm, base=weights.base)
        return checkpoint.config, f"sizes of {weights.model}"
    llm = weights.llm
    vision = weights.vision
    assert llm and vision, "the options name them where there is no --model"
    if llm == weights.defaults["llm"] and not Path(llm).exists():
        text = LLAMA_SIZES[weights.size]
        where = f"no weights at {llm}: sizes of LLaMA-2 {weights.size}"
    else:
        text = text_config(*folder_config(llm))
        where = f"sizes of {llm}"
    if vision == weights.defaults["vision"] and not Path(vision).exists():
        tower = PAPER_TOWER
    else:
        tower = vision_config(*folder_config(vision))
    projector_type = weights.projector_type or QilinConfig.projector_type
    return QilinConfig(text, tower, projector_type), where


def planned_samples(data: PlannedData, weights: PlannedWeights, config: QilinConfig) -> Samples:
    """The samples of the data, or the paper's; ValueError when max_length leaves none."""
    if data.is_default and not all(map(os.path.exists, data.files)):
        samples = paper_samples(
            data.table,
            config.n_image_tokens,
            data.max_length,
            data.files[0],
            data.alignment_text,
        )
    else:
        tokenizer = together(Tokenizer, language_folder(weights.model, weights.llm, weights.base))
        dialogs = data.open_dialogs(data.files, tokenizer, config)
        source = f"lengths of {', '.join(data.files)}"
        samples = Samples(dialogs.lengths, dialogs.n_labels, dialogs.n_pictures, source)
    if not len(samples.lengths):
        raise ValueError(
            f"no sample is left of which --max-length {data.max_length} leaves a label"
        )
    return samples


def run_plan(
    *,
    stage: int,
    export: str,
    weights: PlannedWeights,
    data: PlannedData,
    trained: tuple[str, ...],
    lighter: tuple[str, ...] | None,
    lora: int,
    quantize: str | None,
    batch_size: int,
    epochs: int,
    seed: int,
    max_steps: int,
    micro_batch_size: int | None,
    most: int,
    is_kept: bool | None,
    machine: Machine,
    keep: int,
) -> None:
    """--plan: what there is of weights and data, and the paper's figures for the rest.

    most: the largest micro-batch to choose; lighter: what --lora would train when this does not
    fit, None where it is no choice.
    """
    config, where = planned_config(weights)
    samples = planned_samples(data, weights, config)
    if machine.world_size % machine.replicate:
        raise ValueError(
            f"--replicate {machine.replicate} does not divide {machine.world_size} GPUs"
        )
    lengths = samples.lengths
    sizes = count_sizes(config, trained, lora, quantize, is_fused=True)
    batches = all_batches(
        lengths, batch_size=batch_size, epochs=epochs, seed=seed, max_steps=max_steps
    )
    fit = choose_fit(sizes, machine, lengths, batches, micro_batch_size, is_kept, most)
    would_fit = []
    if fit is None:
        would_fit = changes_that_fit(sizes, machine, lengths, batches, most, lighter)
    plan = Plan(
        stage=stage,
        where=f"{where}; {samples.source}",
        sizes=sizes,
        machine=machine,
        samples=samples,
        batches=batches,
        fit=fit,
        would_fit=would_fit,
        export=export,
        keep=keep,
    )
    print("\n".join(plan_lines(plan)))


# --- 4. this machine ------------------------------------------------------------------------------
# in: --gpu-memory and --gpu-tflops, or what is there; out: Machine

# bf16, dense, summed in float32, by the makers' sheets; the words of a name that torch gives
PEAK_TFLOPS = {
    "A100": 312,
    "A800": 312,
    "A10": 125,
    "A30": 165,
    "A40": 150,
    "RTX A6000": 155,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "RTX 6000 Ada": 364,
    "H100": 989,
    "H100 PCIe": 756,
    "H100 HBM2e": 756,
    "H100 NVL": 835,
    "H800": 989,
    "H800 PCIe": 756,
    "H200": 989,
    "H200 NVL": 835,
    "GH200": 989,
    "H20": 148,
    "B200": 2250,
    "GB200": 2500,
    "3090": 71,
    "4090": 165,
    "5090": 209,
}


def known_tflops(gpu_name: str) -> float | None:
    """The peak of a GPU by the name that torch gives it, None for one not in PEAK_TFLOPS. Whole
    words: an H20 is no H200; of two keys the longer."""
    words = set(re.split(r"[^0-9A-Za-z]+", gpu_name))
    matching = [key for key in PEAK_TFLOPS if words.issuperset(key.split())]
    if not matching:
        return None
    return PEAK_TFLOPS[max(matching, key=len)]


def planned_machine(
    world_size: int,
    gpu_memory: float | None,
    gpu_tflops: float | None,
    gpu_bandwidth: float | None,
    replicate: int,
) -> Machine:
    """The Machine of a plan: A100s of 80 GB with NVLink, but for what is given."""
    return Machine(
        world_size,
        memory=(gpu_memory or DEFAULT_GPU_GIB) * GIB,
        flops=(gpu_tflops or DEFAULT_TFLOPS) * 1e12,
        bandwidth=gpu_bandwidth * 1e9 if gpu_bandwidth else Machine.bandwidth,
        replicate=replicate,
    )


def this_machine(
    device: torch.device,
    *,
    gpu_memory: float | None,
    gpu_tflops: float | None,
    bandwidth: float,
    replicate: int,
) -> Machine:
    """The Machine of this run: on a CPU all ranks share its memory, a fifth is left to others."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        memory = torch.cuda.get_device_properties(device).total_memory
        known = known_tflops(name)
    else:
        all_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = all_memory / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        known = None
    if gpu_memory:
        memory = gpu_memory * GIB
    else:
        # every rank must cut its batch into as many pieces
        memory = min(gather(memory))
    tflops = gpu_tflops or known
    machine = Machine(
        dist.get_world_size(),
        memory,
        (tflops or DEFAULT_TFLOPS) * 1e12,
        bandwidth=bandwidth,
        replicate=replicate,
        is_peak_known=tflops is not None,
    )
    if device.type != "cuda":
        machine.reserve = 0.2 * memory
    return machine
