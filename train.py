"""Train Qilin-Med-VL in the paper's two stages (arXiv 2310.17956, section 4.2).

    torchrun --nproc_per_node 8 train.py --stage 1
        align: the projector alone learns to caption
    torchrun --nproc_per_node 8 train.py --stage 2
        tune: projector and language model learn to answer
    python train.py --stage 2 --plan --world-size 8
        memory, time and disk of such a run, before a GPU is rented
    python train.py --smoke
        five minutes on new GPUs: does all of this work there?

One process works too: `python train.py …`. Without options: the paper's settings, weights in
weights/, data in data/chimed/ (see README). --out holds run.json, log.jsonl (a line a step),
loss.png, samples.jsonl, checkpoints/ and, at the end, final/: stage 1's projector.safetensors,
stage 2's whole model as a folder that sample.py, transformers and vLLM load. Started again, a run
goes on from its newest checkpoint.

One step is one mean over the labelled tokens of the global batch, however it is cut into ranks and
micro-batches; the released code takes a mean of means, which weighs tokens by how their batch
happened to be cut.
"""

import os
import signal

if __name__ == "__main__":
    # Ctrl-C during the imports and the loading ends at once and says nothing; the loop answers it
    # with a checkpoint
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# every batch has another length, which fragments fixed segments; read when torch is imported
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import math
import re
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from common.files import (
    USER_ERRORS,
    check_replaceable,
    folder_beside,
    one_line,
    run_cli,
    say_once,
)
from common.paper import RELEASED_ALIGNMENT, TABLE_1, TABLES
from model_io.adapters import base_folder, language_folder
from model_io.card import Origin, bases_of, names_of_files, projector_name
from model_io.devices import check_torch, choose_training_device, default_dtype
from model_io.export import (
    check_exportable,
    export_limits,
    full_tensors,
    save_qilin,
    save_tensors,
)
from model_io.load import Checkpoint, read_checkpoint
from model_io.lora_export import save_adapter
from model_io.lowbit import QuantizedLinear, add_lora, quantize_linears
from model_io.tokens import Tokenizer
from model_io.weights import load_weights
from model_io.written import check_file, fingerprint
from qilin_min import LOSS_CHUNK, Qilin, QilinConfig
from training.batches import (
    PREFETCHED,
    Dialogs,
    all_batches,
    check_batches,
    count,
    cut_batch,
    load_ahead,
    to_device,
)
from training.checkpoints import (
    Checkpoints,
    Earlier,
    Progress,
    describe_setup,
    hold_out,
    look_back,
)
from training.compiling import choose_compiling, compile_block
from training.costs import (
    Machine,
    Sizes,
    blocks_to_checkpoint,
    checkpoint_bytes,
    count_sizes,
    flops,
)
from training.freeze import freeze, is_llm_tuned, tuned_blocks
from training.log import Log, answer_held_out, held_out_loss, write_run_json
from training.options import DEFAULT_WEIGHTS, RunSettings, settle, training_parser
from training.plan import (
    IS_KEPT,
    Fit,
    PlannedData,
    PlannedWeights,
    choose_fit,
    describe_fit,
    longest_batch,
    planned_machine,
    run_plan,
    this_machine,
)
from training.preflight import (
    check_disk,
    check_host_memory,
    check_links,
    choose_bandwidth,
    n_saves_to_come,
    say_if_impatient,
    workers_that_fit,
)
from training.ranks import (
    StopRequest,
    gather,
    leave,
    make_deterministic,
    on_rank0,
    print0,
    setup_distributed,
    sum_over_ranks,
    together,
)
from training.stages import Stage, check_stages

# --- 1. the two stages ----------------------------------------------------------------------------
# paper, section 5.2, and the released scripts; every row can be overridden by the option of the
# same name. A further stage is a further row

STAGES = {
    1: Stage(
        goal="projector on captions",
        trained=("mm_projector",),
        lr=1e-3,
        batch_size=256,
        micro_batch_size=32,
        data="data/chimed/alignment.json",
        projector_of=None,
        out="out/stage1",
        export="projector",
        result="a projector",
        table=1,
    ),
    2: Stage(
        goal="projector and language model on questions",
        trained=("mm_projector", "llm"),
        lr=2e-5,
        batch_size=128,
        micro_batch_size=16,
        data="data/chimed/instruction.json",
        projector_of=1,
        out="out/stage2",
        export="model",
        result="a language model and a projector",
        table=2,
    ),
}
# --lora, in place of what a stage says; ten times stage 2's rate is LLaVA's choice for adapters
LORA: dict[str, Any] = dict(trained=("mm_projector", "lora"), lr=2e-4)

# what decides a run's numbers: a checkpoint of a run with another choice is refused
DECISIVE_OPTIONS = (
    "stage",
    "batch_size",
    "lr",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "epochs",
    "max_steps",
    "max_length",
    "template",
    "image_mode",
    "seed",
    "lora",
    "lora_alpha",
    "quantize",
)


def read_settings(argv: list[str] | None = None) -> RunSettings | None:
    """What was typed, and what follows from it; None: --smoke, for which nothing else counts."""
    check_stages(STAGES)
    parser = training_parser(__doc__, STAGES, LORA)
    typed = parser.parse_args(argv)
    check_torch()
    if typed.smoke:
        choose_training_device(typed.device)
        return None
    if typed.stage is None:
        choices = " or ".join(f"--stage {number}" for number in STAGES)
        parser.error(f"{choices} is needed (or --smoke)")
    return settle(vars(typed), STAGES, LORA)


# --- 2. model: meta device, freeze, shard, load ---------------------------------------------------


def shard_model(
    model: Qilin,
    device: torch.device,
    trained: tuple[str, ...],
    compute_dtype: torch.dtype,
    replicate: int = 1,
    is_kept: bool = False,
    is_compiled: bool = False,
) -> Qilin:
    """Freeze what is not trained and shard in place with FSDP2: each decoder layer, then the rest
    in one group.

    trained: freeze.WORDS. compute_dtype: bf16 or float32. Trained parameters are
    float32 and cast when gathered, frozen ones are kept in compute_dtype: no gradient, no moments,
    half the memory. Gradients are summed over ranks in float32. replicate: copies of the sharded
    weights, along the first dimension of the mesh (HSDP). is_kept: a block stays gathered until its
    backward.
    The tower is not sharded: 0.6 GB that would be gathered in every step, and a rank without
    pictures must not wait for it. Nor are quantised weights, which are there for machines whose
    GPUs are few.
    """
    freeze(model, trained)
    for param in model.parameters():
        if not param.requires_grad and param.is_floating_point():
            param.data = param.data.to(compute_dtype)
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for module in quantized:
        if module.bits == 8:
            module.scale = module.scale.to(compute_dtype)

    world_size = dist.get_world_size()
    if replicate == 1:
        mesh = init_device_mesh(device.type, (world_size,))
    else:
        mesh = init_device_mesh(
            device.type,
            (replicate, world_size // replicate),
            mesh_dim_names=("replicate", "shard"),
        )
    how: dict[str, Any] = dict(
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        ignored_params={*model.vision_tower.parameters(), *(module.weight for module in quantized)},
    )
    last = model.model.layers[-1]
    for layer in model.model.layers:
        if is_compiled:
            # before sharding, so that gathering is not traced
            compile_block(layer)
        # the last one's backward comes at once
        is_freed = not is_kept and layer is not last
        fully_shard(layer, reshard_after_forward=is_freed, **how)
    fully_shard(model, **how)
    return model


def choose_dtype(asked: str, device: torch.device) -> str:
    """--dtype; auto: bfloat16 on CUDA; on a CPU what rank 0 measures to be faster."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bfloat16"
    dtype, line = on_rank0(default_dtype, device.type)
    print0(line)
    return dtype


def build_model(
    settings: RunSettings, checkpoint: Checkpoint, device: torch.device, is_kept: bool = False
) -> tuple[Qilin, str]:
    """The sharded model with its weights, each rank having read only its own rows. -> (model, line
    that accounts for all tensors)"""
    config = checkpoint.config
    # goes out with the weights, so that they are asked as they were trained
    config.image_mode = settings.image_mode
    with torch.device("meta"):
        model = Qilin(config)
        if settings.quantize:
            quantize_linears(model, bits=int(settings.quantize.removeprefix("int")))
        if settings.lora:
            add_lora(model, settings.lora, settings.lora_alpha)
    is_compiled, line = choose_compiling(settings.compile, device, settings.quantize is not None)
    if line is not None:
        print0(line)
    # what is compiled hangs on the lengths that came first, which another start has not seen
    is_compiled = is_compiled and not settings.deterministic
    model = shard_model(
        model,
        device,
        settings.trained,
        compute_dtype=getattr(torch, settings.dtype),
        replicate=settings.replicate,
        is_kept=is_kept,
        is_compiled=is_compiled,
    )
    line = load_weights(model, checkpoint.sources, device, checkpoint.is_fresh, settings.seed)
    return model, line


# --- 3. optimiser and schedule --------------------------------------------------------------------


def build_optimizer(model: Qilin, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trained."""
    return torch.optim.AdamW(
        [param for param in model.parameters() if param.requires_grad],
        lr=lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=weight_decay,
        fused=True,
    )


def lr_at(step: int, n_steps: int, peak: float, warmup_ratio: float) -> float:
    """Learning rate of a step, 0 <= step < n_steps: linear over ceil(warmup_ratio * n_steps) steps,
    then a half cosine to 0. As transformers' cosine schedule, but the first step is not spent at
    0."""
    warmup = math.ceil(warmup_ratio * n_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


# --- 4. export ------------------------------------------------------------------------------------


def export(settings: RunSettings, model: Qilin, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """final/: what the next stage and sample.py read. Tensors are gathered one at a time."""
    stage = STAGES[settings.stage]
    final = settings.out / "final"
    if settings.lora_export == "adapter":
        export_adapter(settings, model, dtype)
    elif stage.export == "model":
        save_qilin(model, tokenizer, final, dtype, origin_of(settings))
        limits = export_limits(model.config)
        if limits is not None:
            print0(f"{final}: {limits}")
    else:
        save_projector(model, final, stage.final_file, dtype)


def export_adapter(settings: RunSettings, model: Qilin, dtype: torch.dtype) -> None:
    """final/ without the base, which it names instead."""
    base = settings.llm or settings.model
    assert base, "the options name one of them"
    vision = settings.vision
    if vision is None and settings.llm is not None:
        # the language model was given beside a whole one, whose tower it is
        vision = settings.model
    save_adapter(
        model,
        settings.out / "final",
        alpha=settings.lora_alpha,
        base=base,
        vision=vision,
        dtype=dtype,
        made_from=origin_of(settings).how,
    )


def origin_of(settings: RunSettings) -> Origin:
    """What the card of the result tells of the run."""
    parts = (settings.model, settings.llm, settings.base)
    return Origin(
        how=f"{STAGES[settings.stage].result} tuned in stage {settings.stage}",
        bases=bases_of(
            base_folder(*parts), language_folder(*parts), settings.model, settings.vision
        ),
        projector=projector_name(settings.projector),
        data=names_of_files(settings.data),
        template=settings.template,
    )


def save_projector(model: Qilin, final: Path, name: str, dtype: torch.dtype) -> None:
    """A folder with the projector alone, under the names of the released one."""
    tensors = {}
    for ours, full in full_tensors(model, "mm_projector.", dtype):
        tensors["model." + ours] = full
    if dist.get_rank() == 0:
        meant = {key: fingerprint(tensor) for key, tensor in tensors.items()}
        with folder_beside(final) as folder:
            save_tensors(tensors, folder / name)
            check_file(folder / name, meant)
    dist.barrier()


# --- 5. before the first step ---------------------------------------------------------------------
# in: RunSettings; out: Run, all that the loop works with


def open_checkpoint(settings: RunSettings) -> tuple[Checkpoint, Tokenizer]:
    """What can go wrong before data is read: --out, the weights' headers, the tokenizer."""
    stage = STAGES[settings.stage]
    check_out(settings.out, stage.final_file)
    if dist.get_world_size() % settings.replicate:
        raise ValueError(
            f"--replicate {settings.replicate} does not divide {dist.get_world_size()} ranks"
        )
    checkpoint = read_checkpoint(
        settings.model,
        llm=settings.llm,
        vision=settings.vision,
        projector=settings.projector,
        projector_type=settings.projector_type,
        base=settings.base,
    )
    check_projector_type(checkpoint.config.projector_type, settings.projector_type)
    if settings.model and settings.image_mode != checkpoint.config.image_mode:
        say_once(
            f"--image-mode {settings.image_mode}: {settings.model} was trained with pictures made "
            f"square by {checkpoint.config.image_mode}; what comes out will say "
            f"{settings.image_mode}"
        )
    if settings.lora_export == "adapter" and checkpoint.is_merged:
        raise ValueError(
            f"--lora-export adapter: {settings.model} is an adapter itself, and one on top of it "
            "has no base to name: merge it first (convert.py)"
        )
    if stage.export == "model":
        check_exportable(checkpoint.config.projector_type)
    # here, where all ranks say so in one line
    tuned_blocks(settings.trained, checkpoint.config.text.num_hidden_layers)
    n_positions = checkpoint.config.text.max_position_embeddings
    if settings.max_length > n_positions:
        raise ValueError(
            f"--max-length {settings.max_length} is more than the model's {n_positions} positions"
        )
    folder = language_folder(settings.model, settings.llm, settings.base)
    return checkpoint, Tokenizer(folder)


def check_out(out: Path, final_file: str) -> None:
    """ValueError unless a run may write into this folder."""
    if not out.name or (out.exists() and not out.is_dir()):
        raise ValueError(f"--out {str(out)!r} is no folder")
    check_replaceable(out / "final", final_file)
    checkpoints = out / "checkpoints"
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        raise ValueError(f"{checkpoints} is no folder: remove it")


def check_projector_type(given: str, asked_for: str | None) -> None:
    """ValueError when a projector to start from is not of the type that was asked for."""
    if asked_for not in (None, given):
        raise ValueError(
            f"--projector-type {asked_for}: the projector to start from is {given}; leave the "
            "option out, or give --projector fresh"
        )


def hold_on_rank0(out: Path) -> BinaryIO | None:
    """The lock of --out, which rank 0 holds for all."""
    return hold_out(out) if dist.get_rank() == 0 else None


def open_dialogs(
    settings: RunSettings, files: list[str], tokenizer: Tokenizer, config: QilinConfig
) -> Dialogs:
    """Samples of data files as this run reads them."""
    return Dialogs(
        files,
        tokenizer,
        config.n_image_tokens,
        config.vision.image_size,
        template=settings.template,
        max_length=settings.max_length,
        images=settings.images,
        image_mode=settings.image_mode,
        strict=settings.strict,
        out=settings.out,
    )


@dataclass
class RunData:
    """Samples of a run, and their order."""

    dataset: Dialogs
    held_out: Dialogs | None
    # global batches of the whole run, one a step
    batches: list[list[int]]

    @property
    def all_dialogs(self) -> list[Dialogs]:
        """Those to train on, and the held-out ones where there are any."""
        return [self.dataset] if self.held_out is None else [self.dataset, self.held_out]

    @property
    def digests(self) -> dict[str, str]:
        """{file: its sha256}"""
        found = {}
        for dialogs in self.all_dialogs:
            for rows, sha256 in zip(dialogs.files, dialogs.digests, strict=True):
                found[str(rows.path)] = sha256
        return found


def check_default_data(settings: RunSettings) -> None:
    """FileNotFoundError where nobody named data and there is none where a stage looks for it."""
    path = Path(settings.data[0])
    if settings.is_default_data and not path.exists():
        raise FileNotFoundError(
            f"no such data file: {path}: data_prep.py build makes it of the raw sets; files that "
            "were released are named by --data (ChiMed-VL-Alignment.jsonl is PMC-OA alone, "
            f"{RELEASED_ALIGNMENT:,} of the paper's {TABLE_1.n_pairs:,} pairs and no contexts; the "
            "Instruction file may be partial)"
        )


def beside_paper(number: int, n_rows: int, batch_size: int) -> str | None:
    """How many rows there are beside those of the paper's table of this number, None where they are
    as many."""
    n_paper = TABLES[number].n_pairs
    if n_rows == n_paper:
        return None
    line = (
        f"{n_rows:,} rows, {math.ceil(n_rows / batch_size):,} steps of {batch_size} an epoch; "
        f"the paper has {n_paper:,} in its Table {number}, "
        f"{math.ceil(n_paper / batch_size):,} steps"
    )
    # a row more or less: the paper counts 263,176 captions
    if number == 1 and abs(n_rows - RELEASED_ALIGNMENT) <= 1:
        line += ". So many has ChiMed-VL-Alignment.jsonl as released: PMC-OA alone, no contexts"
    return line


def load_data(settings: RunSettings, tokenizer: Tokenizer, config: QilinConfig) -> RunData:
    """What is learnt, what is held out, and the batches."""
    on_rank0(check_default_data, settings)
    dataset = open_dialogs(settings, settings.data, tokenizer, config)
    held_out = None
    if settings.val_data:
        held_out = open_dialogs(settings, [settings.val_data], tokenizer, config)
    batches = all_batches(
        dataset.lengths,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        seed=settings.seed,
        max_steps=settings.max_steps,
    )
    table = STAGES[settings.stage].table
    difference = beside_paper(table, len(dataset) + dataset.n_dropped, settings.batch_size)
    if difference:
        print0(difference)
    return RunData(dataset, held_out, batches)


@dataclass
class Cut:
    """How a step is cut so that it fits into memory."""

    sizes: Sizes
    machine: Machine
    fit: Fit
    # by the plan not even the smallest cut fits
    is_tight: bool
    # samples of a step
    n_per_gpu: int
    # --checkpoint-layers, None: as few as each micro-batch needs
    checkpoint_layers: int | None
    # slots of a micro-batch: blocks
    known: dict[int, int] = field(default_factory=dict)

    def n_checkpointed(self, slots: int) -> int:
        """In how many blocks a micro-batch of so many tokens recomputes: as few as it needs, since
        most batches are short, and each block spared is a third of its work."""
        if self.checkpoint_layers is not None:
            return self.checkpoint_layers
        if slots not in self.known:
            n = blocks_to_checkpoint(
                self.sizes,
                self.machine.n_shards,
                slots,
                self.machine.budget,
                is_kept=self.fit.is_kept,
                is_accumulating=self.n_per_gpu > self.fit.micro_batch_size,
                n_labels=LOSS_CHUNK,
            )
            self.known[slots] = self.sizes.n_blocks if n is None else n
        return self.known[slots]


def cut_steps(
    settings: RunSettings,
    config: QilinConfig,
    data: RunData,
    device: torch.device,
    bandwidth: float,
) -> Cut:
    """The cut that the plan chooses for this machine, but for what the options say. bandwidth: as
    in Machine."""
    sizes = count_sizes(
        config,
        settings.trained,
        settings.lora,
        settings.quantize,
        e=getattr(torch, settings.dtype).itemsize,
        is_fused=device.type == "cuda",
    )
    machine = this_machine(
        device,
        gpu_memory=settings.gpu_memory,
        gpu_tflops=settings.gpu_tflops,
        bandwidth=bandwidth,
        replicate=settings.replicate,
    )
    fit = on_rank0(
        choose_fit,
        sizes,
        machine,
        data.dataset.lengths,
        data.batches,
        micro_batch_size=settings.micro_batch_size,
        is_kept=IS_KEPT[settings.reshard],
        at_most=STAGES[settings.stage].micro_batch_size,
    )
    is_tight = fit is None
    if fit is None:
        smallest = settings.micro_batch_size or 1
        fit = Fit(smallest, settings.reshard == "never", deepest=sizes.n_blocks)
    return Cut(
        sizes=sizes,
        machine=machine,
        fit=fit,
        is_tight=is_tight,
        n_per_gpu=math.ceil(longest_batch(data.batches) / machine.world_size),
        checkpoint_layers=settings.checkpoint_layers,
    )


def check_resources(settings: RunSettings, cut: Cut, earlier: Earlier, n_steps: int) -> None:
    """All ranks stop in one line where the disk or a host's memory is too small for this run."""
    sizes = cut.sizes
    one = checkpoint_bytes(sizes)
    n_to_come = n_saves_to_come(earlier.step, n_steps, settings.save_every)
    n_at_once = min(settings.keep + 1, earlier.n_kept + n_to_come)
    n_more = max(0, n_at_once - earlier.n_kept)
    n_exported = sizes.n_all
    if settings.lora_export == "adapter":
        n_exported = sizes.n_trained
    elif STAGES[settings.stage].export == "projector":
        n_exported = sizes.projector
    on_rank0(check_disk, settings.out, one, n_more, sizes.e * n_exported)
    if n_to_come:
        say_if_impatient(one)
        together(check_host_memory, n_local_ranks() * one / cut.machine.n_shards)


def choose_workers(
    settings: RunSettings, data: RunData, image_size: int, micro_batches: list[list[list[int]]]
) -> int:
    """--workers, or as many as there are spare cores and room in /dev/shm for. micro_batches: of
    each step, this rank's."""
    n_pictures = data.dataset.n_pictures
    most = max(int(n_pictures[part].sum()) for part in chain.from_iterable(micro_batches))
    if data.held_out is not None:
        # a look at them has as many processes of its own
        most += max(map(len, micro_batches[0])) * int(data.held_out.n_pictures.max())
    # float32, three colours
    one = most * 3 * image_size**2 * 4
    return workers_that_fit(settings.workers, spare_workers(), PREFETCHED * one, n_local_ranks())


def n_local_ranks() -> int:
    """Ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def go_on(settings: RunSettings, checkpoints: Checkpoints, data: RunData) -> Progress:
    """Progress of an earlier start, or of a new run, whose pictures are looked for first."""
    progress = checkpoints.resume(settings.resume, settings.allow_changes)
    n_steps = len(data.batches)
    if progress.step > n_steps:
        leave(2, f"the checkpoint is of step {progress.step}, this run has only {n_steps}")
    # a picture lost since does not keep a run from going on
    if progress.step == 0:
        for dialogs in data.all_dialogs:
            together(dialogs.check_pictures)
    return progress


def spare_workers() -> int:
    """Processes that may decode pictures for this rank: spare cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) // n_local_ranks()
    return min(8, max(0, cores - 1))


def open_log(
    settings: RunSettings,
    data: RunData,
    cut: Cut,
    n_params: dict[str, int],
    start: int,
    projector_type: str,
) -> Log:
    """run.json and the log, going on after step number `start`. projector_type: the model's, which
    nobody need have typed."""
    arguments = {**vars(settings), "projector_type": projector_type}
    on_rank0(
        write_run_json,
        settings.out,
        arguments={**arguments, "default_weights": DEFAULT_WEIGHTS},
        n_params=n_params,
        data=data.digests,
        start=start,
    )
    machine = cut.machine
    return together(
        Log,
        settings.out,
        stage=settings.stage,
        n_steps=len(data.batches),
        start=start,
        log_every=settings.log_every,
        peak_flops=machine.flops * machine.world_size if machine.is_peak_known else None,
        has_tensorboard=settings.tensorboard,
    )


def count_by_group(model: Qilin) -> dict[str, int]:
    """Numbers of parameters: all, and those that are trained."""
    return {
        "all": sum(param.numel() for param in model.parameters()),
        "trained": sum(param.numel() for param in model.parameters() if param.requires_grad),
    }


def describe_run(settings: RunSettings, data: RunData, cut: Cut, device: torch.device) -> str:
    """One line: samples, steps, ranks, and how a step is cut."""
    dataset = data.dataset
    line = (
        f"{len(dataset):,} samples ({dataset.n_dropped} dropped, {dataset.n_cut} cut), "
        f"median {int(np.median(dataset.lengths))} tokens; {len(data.batches)} steps of "
        f"{settings.batch_size} on {cut.machine.world_size} ranks, {device.type}; "
        f"{describe_fit(cut.fit, cut.sizes.n_blocks, cut.n_per_gpu)}"
    )
    if cut.is_tight:
        line += "; by --plan this may not fit into memory"
    return line


@dataclass
class Run:
    """What the loop works with."""

    settings: RunSettings
    device: torch.device
    data: RunData
    # of each step, this rank's
    micro_batches: list[list[list[int]]]
    cut: Cut
    model: Qilin
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    checkpoints: Checkpoints
    progress: Progress
    log: Log
    # of rank 0: an open file; closed, it would let another run in
    lock: BinaryIO | None

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return len(self.data.batches)


def start(settings: RunSettings) -> Run | None:
    """Everything before the first step; None when the run is finished already."""
    if settings.deterministic:
        make_deterministic()
    rank, world_size, device = setup_distributed()
    settings = replace(settings, dtype=choose_dtype(settings.dtype, device))
    checkpoint, tokenizer = together(open_checkpoint, settings)
    lock = together(hold_on_rank0, settings.out)
    final = settings.out / "final"
    if on_rank0((final / STAGES[settings.stage].final_file).is_file):
        print0(
            f"{final} is there: this run is finished "
            "(another --out, or remove the folder, to train again)"
        )
        return None

    config = checkpoint.config
    earlier = on_rank0(look_back, settings.out, settings.resume)
    measured = check_links(device, world_size // settings.replicate)
    bandwidth = choose_bandwidth(settings.gpu_bandwidth, earlier.bandwidth, measured)
    data = load_data(settings, tokenizer, config)
    cut = cut_steps(settings, config, data, device, bandwidth)
    check_resources(settings, cut, earlier, len(data.batches))
    micro_batches = [
        cut_batch(batch, rank, world_size, cut.fit.micro_batch_size) for batch in data.batches
    ]
    workers = together(choose_workers, settings, data, config.vision.image_size, micro_batches)
    settings = replace(settings, workers=workers)
    model, accounting = together(build_model, settings, checkpoint, device, cut.fit.is_kept)
    optimizer = build_optimizer(model, settings.lr, settings.weight_decay)
    options = {name: getattr(settings, name) for name in DECISIVE_OPTIONS}
    setup = together(
        describe_setup, options, config, tokenizer, checkpoint.sources, data.dataset.digests
    )
    checkpoints = Checkpoints(
        settings.out, model, optimizer, setup, n_kept=settings.keep, bandwidth=bandwidth
    )
    progress = go_on(settings, checkpoints, data)
    n_params = count_by_group(model)
    log = open_log(settings, data, cut, n_params, progress.step, model.config.projector_type)
    print0(
        f"stage {settings.stage}: {n_params['trained']:,} of {n_params['all']:,} "
        f"parameters trained; {accounting}"
    )
    print0(describe_run(settings, data, cut, device))
    return Run(
        settings=settings,
        device=device,
        data=data,
        micro_batches=micro_batches,
        cut=cut,
        model=model,
        tokenizer=tokenizer,
        optimizer=optimizer,
        checkpoints=checkpoints,
        progress=progress,
        log=log,
        lock=lock,
    )


# --- 6. the loop ----------------------------------------------------------------------------------


def stop_if_needed(run: Run, n: dict[str, float], parts: list[dict[str, Any]]) -> None:
    """Leave, all ranks in the same step and with a checkpoint: when asked to, when a row cannot be
    read, when the pictures are gone. n: sums of count() and asked()."""
    progress = run.progress
    is_mostly_grey = n["grey"] > n["pictures"] / 2
    progress.n_blind_in_a_row = progress.n_blind_in_a_row + 1 if is_mostly_grey else 0
    # a folder that is not mounted is no picture that does not decode
    is_blind = is_mostly_grey and (n["grey"] > 4 or progress.n_blind_in_a_row >= 3)
    if n["errors"] or n["stop_term"] or n["stop_int"] or is_blind:
        run.checkpoints.save(progress, wait=True)
        together(check_batches, parts)
        if is_blind:
            leave(
                2,
                f"step {progress.step + 1}: {int(n['grey'])} of its samples have no picture that "
                f"can be read ({parts[0]['grey'][:1]}): "
                f"is --images {run.settings.images} still there?",
            )
        leave(
            143 if n["stop_term"] else 130,
            f"stopped after step {progress.step} of {run.n_steps}; "
            "the same command goes on from there",
        )
    if n["grey"]:
        mine = [batch["grey"] for batch in parts]
        names = list(chain.from_iterable(gather(list(chain.from_iterable(mine)))))
        progress.n_grey += len(names)
        run.log.grey(progress.step + 1, names)


def look(run: Run, step: int) -> None:
    """Held-out loss and some answers."""
    held_out = run.data.held_out
    if held_out is None:
        return
    # should this end the run, a checkpoint on its way is not lost
    run.checkpoints.finish()
    try:
        loss = held_out_loss(
            run.model,
            held_out,
            run.cut.fit.micro_batch_size,
            run.settings.workers or 0,
            run.device,
        )
        run.log.evaluation(step, loss)
        answer_held_out(
            run.model,
            held_out,
            template=run.settings.template,
            n_samples=run.settings.samples,
            step=step,
            out=run.settings.out,
            device=run.device,
        )
    except ValueError as error:
        # the same on all ranks
        run.checkpoints.save(run.progress, wait=True)
        leave(2, one_line(error))


def backward(run: Run, parts: list[dict[str, Any]], n_targets: float) -> torch.Tensor:
    """This rank's share of a step's loss, the mean over n_targets labels of all ranks; gradients,
    summed over ranks, are in the parameters."""
    model = run.model
    share = torch.zeros((), device=run.device)
    for part in parts:
        # each backward sums its gradients over ranks: kept for the last one, they would stand whole
        # on every rank
        model.model.n_checkpointed = run.cut.n_checkpointed(part["input_ids"].numel())
        loss = model(**to_device(part, run.device), reduction="sum") / max(n_targets, 1)
        # FSDP averages gradients over ranks, and we want their sum
        (loss * dist.get_world_size()).backward()
        share += loss.detach()
    return share


def stop_if_hopeless(run: Run, loss: float, grad_norm: float) -> None:
    """Leave when as many steps in a row were bad as --max-bad-steps allows."""
    most = run.settings.max_bad_steps
    if run.progress.n_bad_in_a_row < most:
        return
    run.checkpoints.finish()
    leave(
        1,
        f"step {run.progress.step}: {most} steps in a row had a loss that is not finite or "
        f"explodes (now {loss:.4g}, gradient norm {grad_norm:.4g}): stopped, "
        "their samples are in log.jsonl (a smaller --lr may help)",
    )


def train(run: Run) -> None:
    """The loop. One step is one mean over labelled tokens, however its batch is cut into ranks and
    micro-batches."""
    settings = run.settings
    optimizer = run.optimizer
    progress = run.progress
    max_norm = settings.max_grad_norm or math.inf
    trained = [param for param in run.model.parameters() if param.requires_grad]
    to_come = chain.from_iterable(run.micro_batches[progress.step :])
    stream = load_ahead(run.data.dataset, list(to_come), settings.workers or 0)
    stop = StopRequest()
    run.model.train()
    for step, batch in enumerate(run.data.batches[progress.step :], progress.step):
        if step % settings.eval_every == 0:
            look(run, step)
        tic = time.perf_counter()
        lr = lr_at(step, run.n_steps, settings.lr, settings.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # labelled tokens are counted over all ranks and micro-batches before the first backward;
        # with them all ranks learn what any one has to say
        parts = [next(stream) for _ in run.micro_batches[step]]
        mine = {**count(parts), **stop.asked(), **run.checkpoints.progress()}
        n = sum_over_ranks(mine)
        if n["written"] == dist.get_world_size():
            run.checkpoints.finish()
        stop_if_needed(run, n, parts)

        step_loss = backward(run, parts, n["targets"])
        step_norm: Any = torch.nn.utils.clip_grad_norm_(trained, max_norm)
        step_norm = step_norm.full_tensor()
        dist.all_reduce(step_loss)
        # the same numbers on all ranks; here, and nowhere else in a step, the GPU is waited for
        loss, grad_norm = torch.stack((step_loss, step_norm)).tolist()

        # not when all its pictures were lost: Adam would move the weights all the same
        is_taught = n["targets"] > 0
        is_bad = is_taught and progress.is_bad(loss, grad_norm)
        if is_bad:
            run.log.bad_step(step + 1, loss, grad_norm, run.data.dataset, batch)
        elif is_taught:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step = step + 1
        if is_taught and not is_bad:
            lengths = run.data.dataset.lengths[batch]
            work = flops(run.cut.sizes, lengths, n["pictures"], n["targets"])
            seconds = time.perf_counter() - tic
            run.log.step(step + 1, loss, lr, grad_norm, seconds, n, work, run.device)
        stop_if_hopeless(run, loss, grad_norm)
        if progress.step % settings.save_every == 0 and progress.step < run.n_steps:
            run.checkpoints.save(progress)


# --- 7. main --------------------------------------------------------------------------------------


def run_training(settings: RunSettings) -> None:
    """A whole run, from where it stands to final/."""
    run = start(settings)
    if run:
        train(run)
        # first: an export that fails costs nothing then
        run.checkpoints.save(run.progress, wait=True)
        export(settings, run.model, run.tokenizer, getattr(torch, run.settings.dtype))
        look(run, run.n_steps)
        run.log.close()
        line = f"done: {settings.out / 'final'}, {settings.out / 'loss.png'}"
        if run.progress.n_bad:
            line += f"; {run.progress.n_bad} steps skipped"
        if run.progress.n_grey:
            line += f"; {run.progress.n_grey} samples had no picture that decodes"
        print0(line)
    dist.destroy_process_group()


def run_guarded(settings: RunSettings) -> None:
    """run_training, with one line for what ends it from outside: memory, or a rank that is gone."""
    try:
        run_training(settings)
    except (dist.DistError, RuntimeError) as error:
        hint = hint_for(error)
        if hint is None:
            raise
        rank = os.environ.get("RANK", 0)
        line = f"train.py: rank {rank}: {one_line(error)[:200]}: {hint}"
        print(line, file=sys.stderr, flush=True)
        # what still waits for the other ranks would wait for ever
        os._exit(1)


def hint_for(error: Exception) -> str | None:
    """What to do about an error from outside, None where it is none."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "try a smaller --micro-batch-size, or --checkpoint-layers 999; "
            "--plan shows what takes the memory"
        )
    if "DataLoader" in str(error):
        return (
            "a process that decodes pictures is gone or stuck: too little memory, "
            "or /dev/shm is small (docker: --shm-size 16g), or try fewer --workers"
        )
    is_of_ranks = re.search("gloo|Connection|peer|NCCL", str(error))
    if isinstance(error, dist.DistError) or is_of_ranks:
        return "another rank is gone; started again, the run goes on from its newest checkpoint"
    return None


def print_plan(settings: RunSettings) -> None:
    """--plan."""
    setup_distributed()
    stage = STAGES[settings.stage]
    run_plan(
        stage=settings.stage,
        export=stage.export,
        weights=PlannedWeights(
            model=settings.model,
            base=settings.base,
            llm=settings.llm,
            vision=settings.vision,
            projector_type=settings.projector_type,
            size=settings.size,
            defaults=DEFAULT_WEIGHTS,
        ),
        data=PlannedData(
            files=settings.data,
            is_default=settings.is_default_data,
            table=stage.table,
            alignment_text=settings.alignment_text,
            max_length=settings.max_length,
            open_dialogs=partial(open_dialogs, settings),
        ),
        trained=settings.trained,
        lighter=LORA["trained"] if is_llm_tuned(settings.trained) else None,
        lora=settings.lora,
        quantize=settings.quantize,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        seed=settings.seed,
        max_steps=settings.max_steps,
        micro_batch_size=settings.micro_batch_size,
        most=stage.micro_batch_size,
        is_kept=IS_KEPT[settings.reshard],
        machine=planned_machine(
            settings.world_size,
            settings.gpu_memory,
            settings.gpu_tflops,
            settings.gpu_bandwidth,
            settings.replicate,
        ),
        keep=settings.keep,
    )


def read_settings_quietly() -> RunSettings | None:
    """On ranks but the first: what is wrong with the options rank 0 says, once."""
    try:
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
            return read_settings()
    except (*USER_ERRORS, SystemExit) as error:
        # torchrun stops the others as soon as one ends
        time.sleep(5)
        sys.exit(error.code if isinstance(error, SystemExit) else 2)


def use_device(device: str) -> None:
    """--device. What is wrong with it may be so on one host alone: the first rank of each says
    it."""
    try:
        choose_training_device(device)
    except ValueError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(5)
        sys.exit(2)


def main() -> None:
    is_rank0 = os.environ.get("RANK", "0") == "0"
    settings = read_settings() if is_rank0 else read_settings_quietly()
    if settings is None:
        if is_rank0:
            # here, since it is a script of its own, which few runs need
            from training.smoke import run_smoke

            run_smoke()
    elif settings.plan:
        # rank 0 does this alone, as it does --smoke
        if is_rank0:
            print_plan(settings)
    else:
        use_device(settings.device)
        run_guarded(settings)


if __name__ == "__main__":
    run_cli(main)
