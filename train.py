"""Train Qilin-Med-VL in the paper's two stages (arXiv 2310.17956, section 4.2).

    torchrun --nproc_per_node 8 train.py --stage 1        align: the projector alone learns to caption
    torchrun --nproc_per_node 8 train.py --stage 2        tune: projector and language model learn to answer
    python train.py --stage 2 --plan --world-size 8       memory, time and disk of such a run, before a GPU is rented
    python train.py --smoke                               five minutes on new GPUs: does all of this work there?

One process works too: `python train.py …`. Without options: the paper's settings, weights in weights/, data in data/chimed/ (see README).
--out holds run.json, log.jsonl (a line a step), loss.png, samples.jsonl, checkpoints/ and, at the end, final/: stage 1's projector.safetensors,
stage 2's whole model as a folder that sample.py, transformers and vLLM load. Started again, a run goes on from its newest checkpoint.

One step is one mean over the labelled tokens of the global batch, however it is cut into ranks and micro-batches; the released code takes
a mean of means, which weighs tokens by how their batch happened to be cut.
"""

import argparse
import functools
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from common.files import (
    USER_ERRORS,
    check_ranges,
    check_replaceable,
    one_line,
    replace_folder,
    run_cli,
)
from model_io.export import check_exportable, full_tensors, save_qilin, save_tensors
from model_io.load import read_checkpoint
from model_io.lowbit import QuantizedLinear, add_lora, quantize_linears
from model_io.tokens import TEMPLATES, Tokenizer
from model_io.weights import load_weights
from qilin_min import LOSS_CHUNK, PROJECTORS, Qilin
from training.batches import (
    Dialogs,
    all_batches,
    check_batches,
    count,
    cut_batch,
    load_ahead,
    to_device,
)
from training.checkpoints import Checkpoints, Progress, describe_setup, hold_out
from training.costs import Sizes, blocks_to_checkpoint, count_sizes, flops
from training.freeze import check_trained, freeze, is_llm_tuned
from training.log import Log, answer_held_out, held_out_loss, write_run_json
from training.plan import (
    IS_KEPT,
    LLAMA_SIZES,
    Fit,
    PlannedData,
    PlannedWeights,
    choose_fit,
    describe_fit,
    planned_machine,
    run_plan,
    this_machine,
)
from training.ranks import (
    StopRequest,
    gather,
    leave,
    on_rank0,
    print0,
    setup_distributed,
    sum_over_ranks,
    together,
)
from training.stages import Stage

if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # Ctrl-C during the imports and the loading ends at once and says nothing; the loop answers it with a checkpoint
os.environ.setdefault(
    "PYTORCH_ALLOC_CONF", "expandable_segments:True"
)  # every batch has another length, which fragments fixed segments; read when torch is imported


# --- 1. the two stages ----------------------------------------------------------------------------------------------
# paper, section 5.2, and the released scripts; every row can be overridden by the option of the same name

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
LORA = dict(trained=("mm_projector", "lora"), lr=2e-4)
DEFAULT_WEIGHTS = {
    "llm": "weights/Llama2-Chinese-13b-Chat",
    "vision": "weights/clip-vit-large-patch14-336",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--stage",
        type=int,
        choices=STAGES,
        help="; ".join(f"{number}: {stage.goal}" for number, stage in STAGES.items()),
    )

    add = parser.add_argument_group("what is trained on what").add_argument
    add("--llm", default=None, help="LLaMA folder (default weights/Llama2-Chinese-13b-Chat)")
    add("--vision", default=None, help="CLIP folder (default weights/clip-vit-large-patch14-336)")
    add("--model", default=None, help="a whole model to go on from, in place of --llm and --vision")
    add(
        "--projector",
        default=None,
        help="file to start from, or `fresh` (default: the one in --model; else stage 1 fresh, stage 2 out/stage1/final/projector.safetensors)",
    )
    add(
        "--projector-type",
        default=None,
        choices=PROJECTORS,
        help="of a fresh one: the paper's, or the released weights' (default linear)",
    )
    add(
        "--data",
        nargs="+",
        default=None,
        help=".json lists or .jsonl of {id, image, conversations}; several are mixed (default by stage: data/chimed/…)",
    )
    add(
        "--images",
        default="data/chimed/images",
        help="folder that the data's picture names are relative to (default %(default)s)",
    )
    add(
        "--strict",
        action="store_true",
        help="stop when a picture does not decode (default: a grey one takes its place and the sample teaches nothing; counted and logged)",
    )
    add(
        "--max-length",
        type=int,
        default=2048,
        help="tokens of a sample, pictures included; the end of longer ones is cut (default %(default)s)",
    )
    add(
        "--template",
        choices=TEMPLATES,
        default="v1",
        help="v1: dialogs, as in the paper; plain: picture then caption, the released stage 1",
    )
    add(
        "--image-mode",
        choices=("pad", "crop"),
        default="pad",
        help="how a picture becomes square (default %(default)s)",
    )

    add = parser.add_argument_group("how it learns").add_argument
    add(
        "--batch-size",
        type=int,
        default=None,
        help="samples a step over all ranks (default 256, 128)",
    )
    add(
        "--lr",
        type=float,
        default=None,
        help="peak learning rate (default 1e-3, 2e-5; with --lora 2e-4)",
    )
    add(
        "--warmup-ratio",
        type=float,
        default=0.03,
        help="share of the steps before the peak (default %(default)s)",
    )
    add("--weight-decay", type=float, default=0.0, help="(default %(default)s)")
    add(
        "--max-grad-norm",
        type=float,
        default=1.0,
        help="gradient norm is clipped there, 0: never (default %(default)s)",
    )
    add(
        "--max-bad-steps",
        type=int,
        default=10,
        help="steps in a row whose loss is not finite or explodes: each is skipped, so many stop the run (default %(default)s)",
    )
    add("--epochs", type=int, default=1, help="(default %(default)s)")
    add(
        "--max-steps",
        type=int,
        default=0,
        help="stop the run after this many steps; the schedule ends there as well (0: by --epochs)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the order of samples and of what starts fresh (default %(default)s)",
    )
    add(
        "--lora",
        type=int,
        default=0,
        metavar="RANK",
        help="stage 2: train low-rank adapters of the language model instead of all of it; merged at the end",
    )
    add(
        "--lora-alpha",
        type=float,
        default=None,
        help="their scale is alpha / rank (default: twice the rank)",
    )
    add(
        "--quantize",
        choices=("int8", "int4"),
        default=None,
        help="keep the language model's frozen blocks in so many bits, whole on every GPU (stage 1, or --lora)",
    )

    add = parser.add_argument_group("how it fits (the plan chooses what is not given)").add_argument
    add(
        "--micro-batch-size",
        type=int,
        default=None,
        help="samples a GPU holds at one time (default: chosen, at most the paper's 32, 16)",
    )
    add(
        "--checkpoint-layers",
        type=int,
        default=None,
        help="blocks that recompute activations in backward (default: as few as each batch needs)",
    )
    add(
        "--reshard",
        choices=("auto", "always", "never"),
        default="auto",
        help="free a block's gathered weights between forward and backward (default auto: where memory wants it)",
    )
    add(
        "--replicate",
        type=int,
        default=1,
        help="HSDP: so many copies of the sharded weights, one a node: only gradients cross nodes (default %(default)s)",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile each block: slower start, one recompilation when lengths vary",
    )
    add(
        "--workers",
        type=int,
        default=None,
        help="processes a rank that decode pictures ahead (default: spare cores, at most 8)",
    )

    add = parser.add_argument_group("stopping and going on").add_argument
    add("--out", default=None, help="folder to write (default out/stage1, out/stage2)")
    add(
        "--save-every",
        type=int,
        default=500,
        help="steps between two checkpoints (default %(default)s)",
    )
    add("--keep", type=int, default=2, help="newest checkpoints kept (default %(default)s)")
    add(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="go on from the newest whole checkpoint in --out, from none, or from this one (default auto)",
    )
    add(
        "--allow-changes",
        action="store_true",
        help="resume although data, weights or settings differ from the checkpoint's",
    )

    add = parser.add_argument_group("what one sees").add_argument
    add(
        "--val-data",
        default=None,
        help="held-out file: its loss is logged, some of its questions are answered",
    )
    add(
        "--eval-every",
        type=int,
        default=500,
        help="steps between two looks at --val-data (default %(default)s; also before and after)",
    )
    add(
        "--samples",
        type=int,
        default=4,
        help="questions of --val-data answered at each look (default %(default)s)",
    )
    add(
        "--log-every",
        type=int,
        default=1,
        help="steps between two printed lines; log.jsonl has every step (default %(default)s)",
    )
    add(
        "--tensorboard",
        action="store_true",
        help="also write --out/tensorboard (pip install tensorboard)",
    )

    add = parser.add_argument_group("before a run").add_argument
    add(
        "--plan",
        action="store_true",
        help="print memory, work, hours and disk, and stop; without weights or data the paper's, saying so",
    )
    add("--world-size", type=int, default=8, help="GPUs of the plan (default %(default)s)")
    add(
        "--gpu-memory",
        type=float,
        default=None,
        help="GiB a GPU (default: what is there; for --plan 80)",
    )
    add(
        "--gpu-tflops",
        type=float,
        default=None,
        help="its peak in bf16 (default: known by its name; for --plan 312, an A100)",
    )
    add(
        "--size",
        choices=LLAMA_SIZES,
        default="13B",
        help="of the plan where there are no weights (default %(default)s)",
    )
    add(
        "--smoke",
        action="store_true",
        help="train, kill, resume and export a random model on this machine's GPUs (or CPU); a table of what works",
    )

    args = parser.parse_args(argv)
    if args.smoke:
        return args
    if args.stage is None:
        parser.error("--stage 1 or --stage 2 is needed (or --smoke)")
    stage, most = STAGES[args.stage], 10**9
    if args.lora:
        stage = replace(stage, **LORA)
    check_trained(stage.trained)
    if args.lora and args.stage != 2:
        raise ValueError(
            "--lora trains adapters of the language model, which stage 1 leaves alone: give it to --stage 2"
        )
    if args.quantize and stage.is_llm_tuned:
        raise ValueError(
            f"--quantize {args.quantize} keeps the language model frozen: add --lora RANK"
        )
    args.trained, args.lora_alpha = (
        stage.trained,
        2.0 * args.lora if args.lora_alpha is None else args.lora_alpha,
    )
    for name in ("lr", "batch_size", "out"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(stage, name))
    args.is_default_data, args.default_weights = args.data is None, DEFAULT_WEIGHTS
    args.data, args.out = args.data or [stage.data], Path(args.out)
    if args.model is None:
        args.llm, args.vision = (
            args.llm or DEFAULT_WEIGHTS["llm"],
            args.vision or DEFAULT_WEIGHTS["vision"],
        )
        if args.projector is None and stage.projector_of:
            args.projector = STAGES[stage.projector_of].projector_file
            if not Path(args.projector).is_file() and not args.plan:
                raise FileNotFoundError(
                    f"stage {args.stage} starts from {args.projector}, which is not there: run --stage 1, or give --projector FILE or --projector fresh"
                )
    check_ranges(
        args,
        lr=(0, 10),
        batch_size=(1, most),
        micro_batch_size=(1, most),
        epochs=(1, 10**4),
        max_steps=(0, most),
        max_length=(2, most),
        warmup_ratio=(0, 1),
        weight_decay=(0, 1),
        max_grad_norm=(0, most),
        checkpoint_layers=(0, most),
        eval_every=(1, most),
        samples=(0, most),
        log_every=(1, most),
        workers=(0, 256),
        seed=(0, 2**31),
        lora=(0, 4096),
        lora_alpha=(0, most),
        replicate=(1, most),
        save_every=(1, most),
        keep=(1, most),
        max_bad_steps=(1, most),
        world_size=(1, 10**5),
        gpu_memory=(0.001, 10**5),
        gpu_tflops=(0.001, 10**6),
    )
    return args


# --- 2. model: meta device, freeze, shard, load ---------------------------------------------------------------------


def shard_model(
    model, device, trained, compute_dtype, replicate=1, is_kept=False, is_compiled=False
):
    """Freeze what is not trained and shard in place with FSDP2: each decoder layer, then the rest in one group.

    trained: of PARTS, and "lora". compute_dtype: bf16 on CUDA, float32 on CPU. Trained parameters are float32 and cast when gathered, frozen ones are
    kept in compute_dtype: no gradient, no moments, half the memory. Gradients are summed over ranks in float32.
    replicate: copies of the sharded weights, along the first dimension of the mesh (HSDP). is_kept: a block stays gathered until its backward.
    The tower is not sharded: 0.6 GB that would be gathered in every step, and a rank without pictures must not wait for it. Nor are quantised
    weights, which are there for machines whose GPUs are few.
    """
    freeze(model, trained)
    for param in model.parameters():
        if not param.requires_grad and param.is_floating_point():
            param.data = param.data.to(compute_dtype)
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for module in quantized:
        module.scale = module.scale.to(compute_dtype)
    world_size = dist.get_world_size()
    mesh = (
        init_device_mesh(device.type, (world_size,))
        if replicate == 1
        else init_device_mesh(
            device.type, (replicate, world_size // replicate), mesh_dim_names=("replicate", "shard")
        )
    )
    how = dict(
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        ignored_params={*model.vision_tower.parameters(), *(module.weight for module in quantized)},
    )
    for layer in model.model.layers:
        if is_compiled:
            layer.compile()  # in place, so that names stay; before sharding, so that gathering is not traced
        fully_shard(layer, reshard_after_forward=not is_kept, **how)
    return fully_shard(model, **how)


def build_model(args, checkpoint, device, is_kept=False):
    """The sharded model with its weights, each rank having read only its own rows. -> (model, line that accounts for all tensors)"""
    config = checkpoint.config
    config.image_mode = (
        args.image_mode
    )  # goes out with the weights, so that they are asked as they were trained
    with torch.device("meta"):
        model = Qilin(config)
        if args.quantize:
            quantize_linears(model, int(args.quantize[3:]))
        if args.lora:
            add_lora(model, args.lora, args.lora_alpha)
    model = shard_model(
        model,
        device,
        args.trained,
        torch.bfloat16 if device.type == "cuda" else torch.float32,
        args.replicate,
        is_kept,
        args.compile,
    )
    return model, load_weights(model, checkpoint.sources, device, checkpoint.is_fresh, args.seed)


# --- 3. optimiser and schedule --------------------------------------------------------------------------------------


def lr_at(step, n_steps, peak, warmup_ratio):
    """Learning rate of a step, 0 <= step < n_steps: linear over ceil(warmup_ratio * n_steps) steps, then a half cosine to 0.
    As transformers' cosine schedule, but the first step is not spent at 0."""
    warmup = math.ceil(warmup_ratio * n_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


# --- 4. export --------------------------------------------------------------------------------------------------


def export(args, model, tokenizer):
    """final/: what the next stage and sample.py read. Tensors are gathered one at a time; bf16 when trained on CUDA."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    final = args.out / "final"
    stage = STAGES[args.stage]
    if stage.export == "model":
        return save_qilin(
            model, tokenizer, final, dtype, f"{stage.result} tuned in stage {args.stage}"
        )
    tensors = {"model." + name: full for name, full in full_tensors(model, "mm_projector.", dtype)}
    if dist.get_rank() == 0:
        partial = final.with_name("final.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_tensors(tensors, partial / "projector.safetensors")
        replace_folder(partial, final)
    dist.barrier()


# --- 5. main --------------------------------------------------------------------------------------------------------


def check_projector_type(given: str, asked_for: str | None) -> None:
    """ValueError when a projector to start from is not of the type that was asked for."""
    if asked_for not in (None, given):
        raise ValueError(
            f"--projector-type {asked_for}: the projector to start from is {given}; leave the "
            "option out, or give --projector fresh"
        )


def prepare(args):
    """What can go wrong before data is read: --out, the weights' headers, the tokenizer. -> (Checkpoint, Tokenizer)"""
    if not args.out.name or (args.out.exists() and not args.out.is_dir()):
        raise ValueError(f"--out {str(args.out)!r} is no folder")
    if dist.get_world_size() % args.replicate:
        raise ValueError(
            f"--replicate {args.replicate} does not divide {dist.get_world_size()} ranks"
        )
    check_replaceable(args.out / "final", STAGES[args.stage].final_file)
    if os.path.lexists(args.out / "checkpoints") and not (args.out / "checkpoints").is_dir():
        raise ValueError(f"{args.out / 'checkpoints'} is no folder: remove it")
    checkpoint = read_checkpoint(
        args.model,
        llm=args.llm,
        vision=args.vision,
        projector=args.projector,
        projector_type=args.projector_type,
    )
    check_projector_type(checkpoint.config.projector_type, args.projector_type)
    if STAGES[args.stage].export == "model":
        check_exportable(checkpoint.config.projector_type)
    if args.max_length > checkpoint.config.text.max_position_embeddings:
        raise ValueError(
            f"--max-length {args.max_length} is more than the model's {checkpoint.config.text.max_position_embeddings} positions"
        )
    return checkpoint, Tokenizer(args.llm or args.model)


@dataclass
class Run:
    """What the loop works with."""

    args: argparse.Namespace
    device: torch.device
    dataset: Dialogs
    held_out: Dialogs | None
    batches: list  # global batches of the whole run, one a step
    micro_batches: list  # of each step, this rank's
    sizes: Sizes
    fit: Fit
    blocks_for: object  # slots of a micro-batch -> blocks that must recompute
    model: Qilin
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    trained: list
    checkpoints: Checkpoints
    progress: Progress
    log: Log
    lock: object  # an open file: closed, it would let another run in


def start(args):
    """Everything before the first step; None when the run is finished already."""
    rank, world_size, device = setup_distributed()
    checkpoint, tokenizer = together(prepare, args)
    held = together(lambda: hold_out(args.out) if rank == 0 else None)
    if on_rank0(lambda: (args.out / "final" / STAGES[args.stage].final_file).is_file()):
        print0(
            f"{args.out / 'final'} is there: this run is finished (another --out, or remove the folder, to train again)"
        )
        return None
    config = checkpoint.config
    dataset, held_out = (
        files
        and Dialogs(
            files,
            tokenizer,
            config.n_image_tokens,
            config.vision.image_size,
            template=args.template,
            max_length=args.max_length,
            images=args.images,
            image_mode=args.image_mode,
            strict=args.strict,
            out=args.out,
        )
        for files in (args.data, args.val_data and [args.val_data])
    )
    batches = all_batches(
        dataset.lengths,
        batch_size=args.batch_size,
        epochs=args.epochs,
        seed=args.seed,
        max_steps=args.max_steps,
    )
    sizes = count_sizes(
        config, args.trained, args.lora, args.quantize, 2 if device.type == "cuda" else 4
    )
    machine = this_machine(
        device,
        gpu_memory=args.gpu_memory,
        gpu_tflops=args.gpu_tflops,
        replicate=args.replicate,
    )
    per_gpu, reshard = (
        math.ceil(max(map(len, batches)) / world_size),
        IS_KEPT[args.reshard],
    )
    fit = on_rank0(
        choose_fit,
        sizes,
        machine,
        dataset.lengths,
        batches,
        args.micro_batch_size,
        reshard,
        STAGES[args.stage].micro_batch_size,
    )
    is_tight, fit = (
        fit is None,
        fit or Fit(args.micro_batch_size or 1, args.reshard == "never", deepest=sizes.n_blocks),
    )

    @functools.cache
    def blocks_for(
        slots,
    ):  # recompute in as few blocks as this micro-batch's tokens need: most batches are short, and each block spared is a third of its work
        if args.checkpoint_layers is not None:
            return args.checkpoint_layers
        n = blocks_to_checkpoint(
            sizes,
            machine.n_shards,
            slots,
            machine.budget,
            is_kept=fit.is_kept,
            is_accumulating=per_gpu > fit.micro_batch_size,
            n_labels=LOSS_CHUNK,
        )
        return sizes.n_blocks if n is None else n

    model, accounting = together(build_model, args, checkpoint, device, fit.is_kept)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=args.lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=args.weight_decay,
        fused=True,
    )
    checkpoints = Checkpoints(
        args,
        model,
        optimizer,
        together(describe_setup, args, config, tokenizer, checkpoint.sources, dataset.digests),
    )
    progress = checkpoints.resume()
    if progress.step > len(batches):
        leave(2, f"the checkpoint is of step {progress.step}, this run has only {len(batches)}")
    if progress.step == 0:  # a picture lost since does not keep a run from going on
        for dialogs in filter(None, (dataset, held_out)):
            together(dialogs.check_pictures)
    if args.workers is None:
        args.workers = min(
            8,
            max(0, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1),
        )
    n_params = {
        "all": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in trained),
    }
    data = {
        str(rows.path): sha256
        for dialogs in filter(None, (dataset, held_out))
        for rows, sha256 in zip(dialogs.files, dialogs.digests)
    }
    on_rank0(
        lambda: write_run_json(
            args.out, arguments=vars(args), n_params=n_params, data=data, start=progress.step
        )
    )
    log = together(
        lambda: Log(
            args.out,
            stage=args.stage,
            n_steps=len(batches),
            start=progress.step,
            log_every=args.log_every,
            peak_flops=machine.flops * world_size if machine.is_peak_known else None,
            has_tensorboard=args.tensorboard,
        )
    )
    print0(
        f"stage {args.stage}: {n_params['trained']:,} of {n_params['all']:,} parameters trained; {accounting}"
    )
    print0(
        f"{len(dataset):,} samples ({dataset.n_dropped} dropped, {dataset.n_cut} cut), median {int(np.median(dataset.lengths))} tokens; {len(batches)} steps of "
        f"{args.batch_size} on {world_size} ranks, {device.type}; {describe_fit(fit, sizes.n_blocks, per_gpu)}"
        + "; by --plan this may not fit into memory"
        * is_tight
    )
    micro_batches = [cut_batch(batch, rank, world_size, fit.micro_batch_size) for batch in batches]
    return Run(
        args,
        device,
        dataset,
        held_out,
        batches,
        micro_batches,
        sizes,
        fit,
        blocks_for,
        model,
        tokenizer,
        optimizer,
        trained,
        checkpoints,
        progress,
        log,
        held,
    )


def stop_if_needed(run, n, parts):
    """Leave, all ranks in the same step and with a checkpoint: when asked to, when a row cannot be read, when the pictures are gone. n: sums of count() and asked()."""
    is_mostly = n["grey"] > n["pictures"] / 2
    run.progress.n_blind_in_a_row = (run.progress.n_blind_in_a_row + 1) * is_mostly
    is_blind = is_mostly and (
        n["grey"] > 4 or run.progress.n_blind_in_a_row >= 3
    )  # a folder that is not mounted is no picture that does not decode
    if n["errors"] or n["stop_term"] or n["stop_int"] or is_blind:
        run.checkpoints.save(run.progress, wait=True)
        together(check_batches, parts)
        if is_blind:
            leave(
                2,
                f"step {run.progress.step + 1}: {int(n['grey'])} of its samples have no picture that can be read ({parts[0]['grey'][:1]}): is --images {run.args.images} still there?",
            )
        leave(
            143 if n["stop_term"] else 130,
            f"stopped after step {run.progress.step} of {len(run.batches)}; the same command goes on from there",
        )
    if n["grey"]:
        names = [
            name
            for rank in gather([name for batch in parts for name in batch["grey"]])
            for name in rank
        ]
        run.progress.n_grey += len(names)
        run.log.grey(run.progress.step + 1, names)


def look(run, step):
    """Held-out loss and some answers."""
    if run.held_out:
        run.checkpoints.finish()  # should this end the run, a checkpoint on its way is not lost
        try:
            loss = held_out_loss(run.model, run.held_out, run.fit.micro_batch_size, run.device)
            run.log.evaluation(step, loss)
            answer_held_out(
                run.model,
                run.held_out,
                template=run.args.template,
                n_samples=run.args.samples,
                step=step,
                out=run.args.out,
                device=run.device,
            )
        except ValueError as error:  # the same on all ranks
            run.checkpoints.save(run.progress, wait=True)
            leave(2, one_line(error))


def train(run):
    """The loop. One step is one mean over labelled tokens, however its batch is cut into ranks and micro-batches."""
    args, model, optimizer, progress, world_size = (
        run.args,
        run.model,
        run.optimizer,
        run.progress,
        dist.get_world_size(),
    )
    stream, stop = (
        load_ahead(
            run.dataset,
            [micro for step in run.micro_batches[progress.step :] for micro in step],
            args.workers,
        ),
        StopRequest(),
    )
    model.train()
    for step, batch in enumerate(run.batches[progress.step :], progress.step):
        if step % args.eval_every == 0:
            look(run, step)
        tic = time.perf_counter()
        lr = lr_at(step, len(run.batches), args.lr, args.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # labelled tokens are counted over all ranks and micro-batches before the first backward; with them all ranks learn what any one has to say
        parts = [next(stream) for _ in run.micro_batches[step]]
        n = sum_over_ranks(
            {**count(parts), **stop.asked(), **run.checkpoints.progress()}, run.device
        )
        if n["written"] == world_size:
            run.checkpoints.finish()
        stop_if_needed(run, n, parts)

        step_loss = 0.0
        for part in parts:  # each backward sums its gradients over ranks: kept for the last one, they would stand whole on every rank
            model.model.n_checkpointed = run.blocks_for(part["input_ids"].numel())
            loss = model(**to_device(part, run.device), reduction="sum") / max(n["targets"], 1)
            (
                loss * world_size
            ).backward()  # FSDP averages gradients over ranks, and we want their sum
            step_loss += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            run.trained, args.max_grad_norm or math.inf
        ).full_tensor()
        dist.all_reduce(step_loss)

        loss, grad_norm = step_loss.item(), grad_norm.item()  # the same numbers on all ranks
        is_taught = (
            n["targets"] > 0
        )  # not when all its pictures were lost: Adam would move the weights all the same
        if is_bad := is_taught and progress.is_bad(loss, grad_norm):
            run.log.bad_step(step + 1, loss, grad_norm, run.dataset, batch)
        elif is_taught:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step = step + 1
        if is_taught and not is_bad:
            work = flops(run.sizes, run.dataset.lengths[batch], n["pictures"], n["targets"])
            run.log.step(
                step + 1, loss, lr, grad_norm, time.perf_counter() - tic, n, work, run.device
            )
        if progress.n_bad_in_a_row >= args.max_bad_steps:
            run.checkpoints.finish()
            leave(
                1,
                f"step {step + 1}: {args.max_bad_steps} steps in a row had a loss that is not finite or explodes (now {loss:.4g}, gradient norm {grad_norm:.4g}): "
                "stopped, their samples are in log.jsonl (a smaller --lr may help)",
            )
        if progress.step % args.save_every == 0 and progress.step < len(run.batches):
            run.checkpoints.save(progress)


def run_training(args):
    run = start(args)
    if run:
        train(run)
        run.checkpoints.save(
            run.progress, wait=True
        )  # first: an export that fails costs nothing then
        export(args, run.model, run.tokenizer)
        look(run, len(run.batches))
        run.log.close()
        print0(
            f"done: {args.out / 'final'}, {args.out / 'loss.png'}"
            + f"; {run.progress.n_bad} steps skipped" * bool(run.progress.n_bad)
            + f"; {run.progress.n_grey} samples had no picture that decodes"
            * bool(run.progress.n_grey)
        )
    dist.destroy_process_group()


def run_guarded(args):
    """run_training, with one line for what ends it from outside: memory, or a rank that is gone."""
    try:
        run_training(args)
    except torch.OutOfMemoryError as error:
        line, hint = (
            one_line(error)[:200],
            "try a smaller --micro-batch-size, or --checkpoint-layers 999; --plan shows what takes the memory",
        )
    except (dist.DistError, RuntimeError) as error:
        if "DataLoader" in str(error):
            line, hint = (
                one_line(error)[:200],
                "a process that decodes pictures is gone or stuck: too little memory, or /dev/shm is small (docker: --shm-size 16g), or try fewer --workers",
            )
        elif not isinstance(error, dist.DistError) and not re.search(
            "gloo|Connection|peer|NCCL", str(error)
        ):
            raise
        else:
            line, hint = (
                one_line(error)[:200],
                "another rank is gone; started again, the run goes on from its newest checkpoint",
            )
    else:
        return
    print(
        f"train.py: rank {os.environ.get('RANK', 0)}: {line}: {hint}", file=sys.stderr, flush=True
    )
    os._exit(1)  # what still waits for the other ranks would wait for ever


def main():
    if os.environ.get("RANK", "0") == "0":
        args = parse_args()
        if args.smoke:
            from training.smoke import run_smoke

            return run_smoke()
        if args.plan:
            setup_distributed()

            def open_dialogs(files, tokenizer, config):
                return Dialogs(
                    files,
                    tokenizer,
                    config.n_image_tokens,
                    config.vision.image_size,
                    template=args.template,
                    max_length=args.max_length,
                    images=args.images,
                    image_mode=args.image_mode,
                    strict=args.strict,
                    out=args.out,
                )

            return run_plan(
                stage=args.stage,
                export=STAGES[args.stage].export,
                weights=PlannedWeights(
                    model=args.model,
                    llm=args.llm,
                    vision=args.vision,
                    projector_type=args.projector_type,
                    size=args.size,
                    defaults=DEFAULT_WEIGHTS,
                ),
                data=PlannedData(
                    files=args.data,
                    is_default=args.is_default_data,
                    table=STAGES[args.stage].table,
                    max_length=args.max_length,
                    open_dialogs=open_dialogs,
                ),
                trained=args.trained,
                lighter=LORA["trained"] if is_llm_tuned(args.trained) else None,
                lora=args.lora,
                quantize=args.quantize,
                batch_size=args.batch_size,
                epochs=args.epochs,
                seed=args.seed,
                max_steps=args.max_steps,
                micro_batch_size=args.micro_batch_size,
                most=STAGES[args.stage].micro_batch_size,
                is_kept=IS_KEPT[args.reshard],
                machine=planned_machine(
                    args.world_size, args.gpu_memory, args.gpu_tflops, args.replicate
                ),
                keep=args.keep,
            )
        return run_guarded(args)
    try:  # what is wrong with the options rank 0 says, once
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
            args = parse_args()
    except (*USER_ERRORS, SystemExit) as error:
        time.sleep(5)  # torchrun stops the others as soon as one ends
        sys.exit(error.code if isinstance(error, SystemExit) else 2)
    if not (args.plan or args.smoke):  # rank 0 does those alone
        run_guarded(args)


if __name__ == "__main__":
    run_cli(main)
