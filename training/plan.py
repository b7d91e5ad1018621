"""What a training run needs, from its sizes alone: memory, work, time, disk. `python train.py --stage 2 --plan --world-size 8` prints it.

Every figure is a formula of a line or two, in bytes and floating-point operations, that a reader can follow; tests hold them to a memory tracker.
train.py asks the same formulas, step by step, how many blocks must recompute their activations.

C hidden size, F MLP width, V vocabulary, L blocks, T tokens with padding (slots) that a GPU holds at one time, W GPUs that share one copy of the weights,
e bytes of a number in compute (2: bf16 on CUDA, 4: float32 on a CPU). Trained weights, their gradients and both of Adam's moments are float32: 16 bytes each.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from model_io.load import folder_config, read_checkpoint
from model_io.tokens import Tokenizer
from qilin_min import LOSS_CHUNK, QilinConfig, TextConfig, VisionConfig, text_config, vision_config
from training.batches import Dialogs, all_batches
from training.costs import (
    GIB,
    RESERVE_GIB,
    SPARE_GIB,
    Machine,
    Sizes,
    blocks_to_checkpoint,
    flops,
    memory,
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
PAPER_TOWER = VisionConfig(1024, 4096, 24, 16, 336, 14)  # CLIP ViT-L/14-336


# --- 1. what fits --------------------------------------------------------------------------------------------------


@dataclass
class Fit:
    """How a run is cut: see choose_fit()."""

    micro_batch_size: int
    is_kept: bool  # blocks stay gathered between forward and backward
    seconds: float = 0.0  # estimated, of all steps
    recomputed: float = 0.0  # share of blocks x tokens computed twice
    deepest: int = 0  # most blocks recomputing in any step


def micro_batch_slots(lengths, batch, W, micro_batch_size):
    """Slots of each micro-batch of the first rank, which gets the longest sample of every global batch (sorted, longest first)."""
    mine = lengths[batch[::W]]
    return [
        int(mine[i] * len(mine[i : i + micro_batch_size]))
        for i in range(0, len(mine), micro_batch_size)
    ]


def choose_fit(sizes, machine, lengths, batches, micro_batch_size=None, is_kept=None, at_most=None):
    """The Fit that is done soonest among those that fit into the machine's memory, or None.

    Fewer samples at a time leave room for activations, so that fewer blocks compute theirs again (all of them: a third more work forward and backward
    than needed); but each micro-batch gathers the weights and sums gradients over ranks, which hides behind the computing only while there is enough of it.
    """
    W, shards = machine.world_size, machine.world_size // machine.replicate
    per_gpu = math.ceil(max(map(len, batches)) / W)
    largest = min(at_most or per_gpu, per_gpu)
    candidates = (
        [micro_batch_size]
        if micro_batch_size
        else sorted(
            {math.ceil(largest / 2**k) for k in range(largest.bit_length() + 1)}, reverse=True
        )
    )
    best, blocks_of = None, {}
    per_token = (
        2 * sizes.linear * (3 if "llm" in sizes.trained else 2) / (0.5 * machine.flops)
    )  # seconds a block, at half of the peak
    for size in candidates:
        cuts = [micro_batch_slots(lengths, batch, W, size) for batch in batches]
        for keep in (False, True) if is_kept is None else (is_kept,):
            how = dict(is_kept=keep, is_accumulating=per_gpu > size, n_labels=LOSS_CHUNK)
            gathers = sizes.e * sizes.L * sizes.gathered_block * (1 if keep else 2)
            moved = (
                (gathers + 4 * sizes.n_trained) * (shards - 1) / shards / machine.bandwidth
            )  # seconds a micro-batch
            seconds = again = total = deepest = 0.0
            for cut in cuts:
                for slots in cut:
                    key = (slots, keep, how["is_accumulating"])
                    if key not in blocks_of:
                        blocks_of[key] = blocks_to_checkpoint(
                            sizes, shards, slots, machine.budget, **how
                        )
                    n = blocks_of[key]
                    if n is None:
                        break
                    deepest = max(deepest, n)
                    again, total = again + n * slots, total + sizes.L * slots
                    seconds += max(
                        slots * per_token * (sizes.L + n / (3 if "llm" in sizes.trained else 2)),
                        moved,
                    )
                else:
                    continue
                break
            else:
                if (
                    best is None or seconds < 0.98 * best.seconds
                ):  # the larger micro-batch unless the gain is real
                    best = Fit(size, keep, seconds, again / total, int(deepest))
    return best


# --- 2. lengths where there is no data ------------------------------------------------------------------------------

PROMPT = 60  # tokens of the system sentence, roles and a request


def paper_lengths(stage, n_image_tokens, seed=0):
    """(lengths, labels) in tokens of samples like the paper's, int64 (n,): lognormal with the medians and quartiles of its Tables 1 and 2, cut at their maxima.
    Stage 1: PMC-CaseReport, every other sample a context, else an inline text, and PMC-OA captions. Stage 2: questions and answers of both sources."""
    rng = np.random.default_rng(seed)

    def draw(n, median, q1, q3, most):
        sigma = math.log(q3 / q1) / (
            2 * 0.67449
        )  # the quartiles of a normal lie 0.67449 sigma from its middle
        return np.minimum(np.exp(rng.normal(math.log(median), sigma, n)), most).astype(np.int64) + 1

    if stage == 1:
        labels = np.concatenate(
            [
                draw(158_419, 435, 211, 757, 2576),
                draw(158_419, 59, 41, 83, 1551),
                draw(263_176, 125, 68, 210, 1417),
            ]
        )
        return n_image_tokens + PROMPT + labels, labels
    labels = np.concatenate([draw(316_838, 27, 20, 38, 451), draw(152_603, 10, 6, 16, 732)])
    return n_image_tokens + PROMPT + np.concatenate(
        [draw(316_838, 21, 16, 26, 4040), draw(152_603, 18, 15, 22, 335)]
    ) + labels, labels


def padding_share(lengths, batches, W, micro_batch_size):
    """Share of padding in what the GPUs compute, each micro-batch being padded to its longest row."""
    slots = 0
    for batch in batches:
        for rank in range(min(W, len(batch))):
            mine = lengths[batch[rank::W]]
            slots += sum(
                int(mine[i : i + micro_batch_size].max() * len(mine[i : i + micro_batch_size]))
                for i in range(0, len(mine), micro_batch_size)
            )
    return 1 - float(sum(lengths[batch].sum() for batch in batches)) / slots


# --- 3. the plan ----------------------------------------------------------------------------------------------------


def describe_fit(fit, n_layers, per_gpu):
    """One line: how the batch is cut, and why."""
    parts = f"{per_gpu} samples a step and GPU, {fit.micro_batch_size} at a time; "
    parts += (
        "no block recomputes its activations"
        if fit.deepest == 0
        else f"at most {fit.deepest} of {n_layers} blocks recompute their activations ({fit.recomputed:.0%} of their work is done twice)"
    )
    return parts + ("; blocks stay gathered between forward and backward" if fit.is_kept else "")


def print_plan(
    stage, sizes, machine, lengths, labels, n_pictures, batches, fit, keep, where, would_fit
):
    """The plan on stdout. labels: labelled tokens of each sample; keep: checkpoints kept; where: what sizes and lengths come from; would_fit(): changes to make if it does not."""
    W, shards, per_gpu = (
        machine.world_size,
        machine.world_size // machine.replicate,
        math.ceil(max(map(len, batches)) / machine.world_size),
    )
    print(
        f"plan of stage {stage} on {W} GPU{'s' * (W > 1)} of {machine.memory / GIB:.0f} GiB, {machine.flops / 1e12:.0f} TFLOPS ({where})"
    )
    print(
        f"  {sizes.n_trained / 1e9:.2f} of {sizes.n_all / 1e9:.2f} billion parameters trained"
        + f", LoRA of rank {sizes.lora}" * bool(sizes.lora)
        + f", base in {sizes.quantize}" * bool(sizes.quantize)
    )
    shown = fit or Fit(1, False, deepest=sizes.L, recomputed=1.0)
    slots = max(
        max(micro_batch_slots(lengths, batch, W, shown.micro_batch_size)) for batch in batches
    )
    how = dict(
        n_labels=LOSS_CHUNK, is_kept=shown.is_kept, is_accumulating=per_gpu > shown.micro_batch_size
    )
    n = blocks_to_checkpoint(sizes, shards, slots, machine.budget, **how)
    parts = memory(sizes, shards, slots, sizes.L if n is None else n, **how)
    print(
        f"  {describe_fit(shown, sizes.L, per_gpu)}"
        + f"; more GPUs than samples a step: {W - max(map(len, batches)):,} stand idle"
        * (W > max(map(len, batches)))
    )
    print(
        f"memory a GPU, GiB, in the largest step (micro-batch of {slots:,} tokens with padding, {sizes.L if n is None else n} of {sizes.L} blocks recomputing):"
    )
    for name, size in parts.items():
        if name != "peak":
            print(f"  {name:<20} {size / GIB:6.1f}")
    spare = machine.memory / GIB - RESERVE_GIB - parts["peak"] / GIB
    print(
        f"peak {parts['peak'] / GIB:.1f} GiB a GPU of {machine.memory / GIB:.0f}; about {RESERVE_GIB:.0f} for CUDA context, NCCL and fragmentation; "
        + (
            f"fits, {spare:.1f} GiB to spare"
            if fit
            else f"DOES NOT FIT with {SPARE_GIB:.0f} GiB to spare ({spare:.1f})"
        )
    )
    if not fit:
        for line in would_fit():
            print(f"  would fit: {line}")
    n_tokens, steps = int(sum(lengths[b].sum() for b in batches)), len(batches)
    work = sum(flops(sizes, lengths[b], n_pictures[b].sum(), labels[b].sum()) for b in batches)
    print(
        f"steps {steps:,} of {max(map(len, batches))} samples, {sum(map(len, batches)):,} samples, {n_tokens / 1e6:,.1f} M tokens, "
        f"{sum(int(labels[b].sum()) for b in batches) / 1e6:,.1f} M of them labelled"
    )
    shuffled = np.random.default_rng(0).permutation(len(lengths))
    mixed = [shuffled[i : i + len(batches[0])] for i in range(0, len(lengths), len(batches[0]))]
    print(
        f"padding {padding_share(lengths, batches, W, shown.micro_batch_size):.1%}, in random batches it would be {padding_share(lengths, mixed, W, shown.micro_batch_size):.1%}"
    )
    print(f"work {work / steps:.3g} FLOPs a step, {work:.3g} in all (nothing counted twice)")
    hours = [
        work / (share * machine.flops * min(W, max(map(len, batches)))) / 3600
        for share in (0.4, 0.5, 0.6)
    ]  # a GPU without a sample waits
    print(
        f"hours {hours[0]:.1f} / {hours[1]:.1f} / {hours[2]:.1f} at 40 / 50 / 60 % of peak"
        + (
            f", about {shown.recomputed / (3 if 'llm' in sizes.trained else 2):.0%} more for what is recomputed"
            if shown.deepest
            else ""
        )
    )
    one = 12 * sizes.n_trained
    final = sizes.e * (sizes.n_all if "llm" in sizes.trained or sizes.lora else sizes.projector)
    print(
        f"disk {((keep + 1) * one + final) / 1e9:.1f} GB: {keep} checkpoints of {one / 1e9:.1f} GB and one being written, final weights {final / 1e9:.1f} GB; "
        f"host memory {one * machine.replicate / 1e9:.1f} GB more over all ranks while one is written"
    )


def run_plan(
    *,
    stage: int,
    model: str | None,
    llm: str | None,
    vision: str | None,
    projector_type: str,
    default_weights: dict[str, str],
    size: str,
    data: list[str],
    is_default_data: bool,
    open_dialogs: Callable[[list[str], Tokenizer, QilinConfig], Dialogs],
    max_length: int,
    trained: tuple[str, ...],
    lighter: tuple[str, ...],
    lora: int,
    quantize: str | None,
    batch_size: int,
    epochs: int,
    seed: int,
    max_steps: int,
    micro_batch_size: int | None,
    most: int,
    reshard: str,
    world_size: int,
    replicate: int,
    gpu_memory: float | None,
    gpu_tflops: float | None,
    keep: int,
) -> None:
    """--plan: what there is of weights and data, and the paper's figures for the rest. most: the largest micro-batch; lighter: what is trained when this does not fit."""
    missing = [
        name
        for name, given in (("llm", llm), ("vision", vision))
        if model is None and given == default_weights[name] and not Path(given).exists()
    ]
    config = (
        read_checkpoint(model).config
        if model
        else QilinConfig(
            LLAMA_SIZES[size] if "llm" in missing else text_config(*folder_config(llm)),
            PAPER_TOWER if "vision" in missing else vision_config(*folder_config(vision)),
            projector_type,
        )
    )
    where = (
        f"no weights at {llm}: sizes of LLaMA-2 {size}"
        if "llm" in missing
        else f"sizes of {model or llm}"
    )
    if is_default_data and not all(map(os.path.exists, data)):
        lengths, labels = paper_lengths(stage, config.n_image_tokens)
        n_over = np.maximum(lengths - max_length, 0)
        lengths, labels, where = (
            lengths - n_over,
            labels - n_over,
            where + f"; no data at {data[0]}: lengths drawn by the paper's Table {stage}",
        )
        lengths, labels = lengths[labels > 0], labels[labels > 0]
        n_pictures = np.ones_like(lengths)
    else:
        dataset = open_dialogs(data, together(Tokenizer, llm or model), config)
        lengths, labels, n_pictures, where = (
            dataset.lengths,
            dataset.n_labels,
            dataset.n_pictures,
            where + f"; lengths of {', '.join(data)}",
        )
    if not len(lengths):
        raise ValueError(f"no sample is left of which --max-length {max_length} leaves a label")
    sizes = Sizes(config, trained, lora, quantize)
    machine = Machine(
        world_size,
        (gpu_memory or 80) * GIB,
        (gpu_tflops or 312) * 1e12,
        replicate=replicate,
    )
    if machine.world_size % machine.replicate:
        raise ValueError(
            f"--replicate {machine.replicate} does not divide {machine.world_size} GPUs"
        )
    batches = all_batches(
        lengths, batch_size=batch_size, epochs=epochs, seed=seed, max_steps=max_steps
    )
    fit = choose_fit(
        sizes,
        machine,
        lengths,
        batches,
        micro_batch_size,
        {"auto": None, "always": False, "never": True}[reshard],
        most,
    )

    def would_fit():
        """Changes with which the largest batch fits."""

        def fits(sizes, machine):
            return choose_fit(sizes, machine, lengths, batches[:1], None, None, most)

        for n in (machine.world_size * 2**k for k in range(1, 8)):
            if fits(sizes, replace(machine, world_size=n)):
                yield f"--world-size {n}"
                break
        for gib in (24, 40, 48, 80, 141, 192):
            if gib * GIB > machine.memory and fits(sizes, replace(machine, memory=gib * GIB)):
                yield f"GPUs of {gib} GiB"
                break
        for words in ((64, None), (64, "int8"), (16, "int4")) if stage == 2 and not lora else ():
            if fits(Sizes(config, lighter, *words), machine):
                yield f"--lora {words[0]}" + f" --quantize {words[1]}" * bool(words[1])
                break
        if stage == 1 and not quantize and fits(Sizes(config, trained, 0, "int8"), machine):
            yield "--quantize int8"

    print_plan(
        stage,
        sizes,
        machine,
        lengths,
        labels,
        n_pictures,
        batches,
        fit,
        keep,
        where,
        would_fit,
    )


PEAK_TFLOPS = {
    "A100": 312,
    "A800": 312,
    "H100": 989,
    "H800": 989,
    "H200": 989,
    "H20": 148,
    "L40S": 362,
    "4090": 165,
    "3090": 71,
}  # bf16, dense, by the makers' sheets


def this_machine(
    device: torch.device,
    *,
    gpu_memory: float | None,
    gpu_tflops: float | None,
    replicate: int,
) -> Machine:
    """The Machine of this run: on a CPU all ranks share its memory, a fifth is left to others."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        memory = torch.cuda.get_device_properties(device).total_memory
        known = [peak for key, peak in PEAK_TFLOPS.items() if key in name]
    else:
        all_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = all_memory / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        known = []
    if gpu_memory:
        memory = gpu_memory * GIB
    else:
        # every rank must cut its batch into as many pieces
        memory = min(gather(memory))
    tflops = gpu_tflops or next(iter(known), None)
    machine = Machine(
        dist.get_world_size(),
        memory,
        (tflops or 312) * 1e12,
        replicate=replicate,
        is_peak_known=tflops is not None,
    )
    if device.type != "cuda":
        machine.reserve = 0.2 * memory
    return machine
