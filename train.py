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
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    FileSystemReader,
    FileSystemWriter,
    async_save,
    load as load_sharded,
)
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from batches import (
    Dialogs,
    all_batches,
    check_batches,
    count,
    cut_batch,
    gather,
    leave,
    load_ahead,
    on_rank0,
    print0,
    sum_over_ranks,
    to_device,
    together,
)
from common.files import (
    USER_ERRORS,
    check_ranges,
    check_replaceable,
    digest,
    one_line,
    read_json,
    replace_folder,
    run_cli,
    write_json,
)
from log import Log, answer_held_out, evaluate
from model_io.export import full_tensors, save_qilin, save_tensors
from model_io.load import read_checkpoint
from model_io.lowbit import QuantizedLinear, add_lora, quantize_linears
from model_io.tokens import TEMPLATES, Tokenizer
from plan import (
    Fit,
    GIB,
    LLAMA_SIZES,
    Machine,
    Sizes,
    blocks_to_checkpoint,
    choose,
    describe_fit,
    flops,
    run_plan,
)
from qilin_min import LOSS_CHUNK, Qilin, load_weights, part_of

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports and the loading ends at once and says nothing; the loop answers it with a checkpoint
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # every batch has another length, which fragments fixed segments; read when torch is imported


# --- 1. the two stages ----------------------------------------------------------------------------------------------
# paper, section 5.2, and the released scripts; every row can be overridden by the option of the same name

STAGES = {
    1: dict(trained=("mm_projector",), lr=1e-3, batch_size=256, micro_batch_size=32, data="data/chimed/alignment.json", projector=None, out="out/stage1"),
    2: dict(trained=("mm_projector", "llm"), lr=2e-5, batch_size=128, micro_batch_size=16, data="data/chimed/instruction.json",
            projector="out/stage1/final/projector.safetensors", out="out/stage2"),
}
LORA = dict(trained=("mm_projector", "lora"), lr=2e-4)  # in place of stage 2's; ten times its rate is LLaVA's choice for adapters
FINAL_FILES = {1: "projector.safetensors", 2: "config.json"}  # in --out/final, of a finished run
DEFAULT_WEIGHTS = {"llm": "weights/Llama2-Chinese-13b-Chat", "vision": "weights/clip-vit-large-patch14-336"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", type=int, choices=STAGES, help="1: projector on captions; 2: projector and language model on questions")

    add = parser.add_argument_group("what is trained on what").add_argument
    add("--llm", default=None, help="LLaMA folder (default weights/Llama2-Chinese-13b-Chat)")
    add("--vision", default=None, help="CLIP folder (default weights/clip-vit-large-patch14-336)")
    add("--model", default=None, help="a whole model to go on from, in place of --llm and --vision")
    add("--projector", default=None, help="file to start from, or `fresh` (default: the one in --model; else stage 1 fresh, stage 2 out/stage1/final/projector.safetensors)")
    add("--projector-type", default="linear", choices=("linear", "mlp2x_gelu"), help="of a fresh one: the paper's, or the released weights' (default %(default)s)")
    add("--data", nargs="+", default=None, help=".json lists or .jsonl of {id, image, conversations}; several are mixed (default by stage: data/chimed/…)")
    add("--images", default="data/chimed/images", help="folder that the data's picture names are relative to (default %(default)s)")
    add("--strict", action="store_true", help="stop when a picture does not decode (default: a grey one takes its place and the sample teaches nothing; counted and logged)")
    add("--max-length", type=int, default=2048, help="tokens of a sample, pictures included; the end of longer ones is cut (default %(default)s)")
    add("--template", choices=TEMPLATES, default="v1", help="v1: dialogs, as in the paper; plain: picture then caption, the released stage 1")
    add("--image-mode", choices=("pad", "crop"), default="pad", help="how a picture becomes square (default %(default)s)")

    add = parser.add_argument_group("how it learns").add_argument
    add("--batch-size", type=int, default=None, help="samples a step over all ranks (default 256, 128)")
    add("--lr", type=float, default=None, help="peak learning rate (default 1e-3, 2e-5; with --lora 2e-4)")
    add("--warmup-ratio", type=float, default=0.03, help="share of the steps before the peak (default %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="(default %(default)s)")
    add("--max-grad-norm", type=float, default=1.0, help="gradient norm is clipped there, 0: never (default %(default)s)")
    add("--max-bad-steps", type=int, default=10, help="steps in a row whose loss is not finite or explodes: each is skipped, so many stop the run (default %(default)s)")
    add("--epochs", type=int, default=1, help="(default %(default)s)")
    add("--max-steps", type=int, default=0, help="stop the run after this many steps; the schedule ends there as well (0: by --epochs)")
    add("--seed", type=int, default=0, help="of the order of samples and of what starts fresh (default %(default)s)")
    add("--lora", type=int, default=0, metavar="RANK", help="stage 2: train low-rank adapters of the language model instead of all of it; merged at the end")
    add("--lora-alpha", type=float, default=None, help="their scale is alpha / rank (default: twice the rank)")
    add("--quantize", choices=("int8", "int4"), default=None, help="keep the language model's frozen blocks in so many bits, whole on every GPU (stage 1, or --lora)")

    add = parser.add_argument_group("how it fits (the plan chooses what is not given)").add_argument
    add("--micro-batch-size", type=int, default=None, help="samples a GPU holds at one time (default: chosen, at most the paper's 32, 16)")
    add("--checkpoint-layers", type=int, default=None, help="blocks that recompute activations in backward (default: as few as each batch needs)")
    add("--reshard", choices=("auto", "always", "never"), default="auto", help="free a block's gathered weights between forward and backward (default auto: where memory wants it)")
    add("--replicate", type=int, default=1, help="HSDP: so many copies of the sharded weights, one a node: only gradients cross nodes (default %(default)s)")
    add("--compile", action="store_true", help="torch.compile each block: slower start, one recompilation when lengths vary")
    add("--workers", type=int, default=None, help="processes a rank that decode pictures ahead (default: spare cores, at most 8)")

    add = parser.add_argument_group("stopping and going on").add_argument
    add("--out", default=None, help="folder to write (default out/stage1, out/stage2)")
    add("--save-every", type=int, default=500, help="steps between two checkpoints (default %(default)s)")
    add("--keep", type=int, default=2, help="newest checkpoints kept (default %(default)s)")
    add("--resume", default="auto", metavar="auto|never|PATH", help="go on from the newest whole checkpoint in --out, from none, or from this one (default auto)")
    add("--allow-changes", action="store_true", help="resume although data, weights or settings differ from the checkpoint's")

    add = parser.add_argument_group("what one sees").add_argument
    add("--val-data", default=None, help="held-out file: its loss is logged, some of its questions are answered")
    add("--eval-every", type=int, default=500, help="steps between two looks at --val-data (default %(default)s; also before and after)")
    add("--samples", type=int, default=4, help="questions of --val-data answered at each look (default %(default)s)")
    add("--log-every", type=int, default=1, help="steps between two printed lines; log.jsonl has every step (default %(default)s)")
    add("--tensorboard", action="store_true", help="also write --out/tensorboard (pip install tensorboard)")

    add = parser.add_argument_group("before a run").add_argument
    add("--plan", action="store_true", help="print memory, work, hours and disk, and stop; without weights or data the paper's, saying so")
    add("--world-size", type=int, default=8, help="GPUs of the plan (default %(default)s)")
    add("--gpu-memory", type=float, default=None, help="GiB a GPU (default: what is there; for --plan 80)")
    add("--gpu-tflops", type=float, default=None, help="its peak in bf16 (default: known by its name; for --plan 312, an A100)")
    add("--size", choices=LLAMA_SIZES, default="13B", help="of the plan where there are no weights (default %(default)s)")
    add("--smoke", action="store_true", help="train, kill, resume and export a random model on this machine's GPUs (or CPU); a table of what works")

    args = parser.parse_args(argv)
    if args.smoke:
        return args
    if args.stage is None:
        parser.error("--stage 1 or --stage 2 is needed (or --smoke)")
    stage, most = dict(STAGES[args.stage], **(LORA if args.lora else {})), 10**9
    if args.lora and args.stage != 2:
        raise ValueError("--lora trains adapters of the language model, which stage 1 leaves alone: give it to --stage 2")
    if args.quantize and "llm" in stage["trained"]:
        raise ValueError(f"--quantize {args.quantize} keeps the language model frozen: add --lora RANK")
    args.trained, args.lora_alpha = stage["trained"], 2.0 * args.lora if args.lora_alpha is None else args.lora_alpha
    for name in ("lr", "batch_size", "out"):
        if getattr(args, name) is None:
            setattr(args, name, stage[name])
    args.is_default_data, args.default_weights = args.data is None, DEFAULT_WEIGHTS
    args.data, args.out = args.data or [stage["data"]], Path(args.out)
    if args.model is None:
        args.llm, args.vision = args.llm or DEFAULT_WEIGHTS["llm"], args.vision or DEFAULT_WEIGHTS["vision"]
        if args.projector is None and stage["projector"]:
            args.projector = stage["projector"]
            if not Path(args.projector).is_file() and not args.plan:
                raise FileNotFoundError(f"stage {args.stage} starts from {args.projector}, which is not there: run --stage 1, or give --projector FILE or --projector fresh")
    check_ranges(args, lr=(0, 10), batch_size=(1, most), micro_batch_size=(1, most), epochs=(1, 10**4), max_steps=(0, most), max_length=(2, most), warmup_ratio=(0, 1),
                 weight_decay=(0, 1), max_grad_norm=(0, most), checkpoint_layers=(0, most), eval_every=(1, most), samples=(0, most), log_every=(1, most), workers=(0, 256),
                 seed=(0, 2**31), lora=(0, 4096), lora_alpha=(0, most), replicate=(1, most), save_every=(1, most), keep=(1, most), max_bad_steps=(1, most), world_size=(1, 10**5),
                 gpu_memory=(0.001, 10**5), gpu_tflops=(0.001, 10**6))
    return args


# --- 2. ranks -------------------------------------------------------------------------------------------------------


def setup_distributed():
    """(rank, world size, device). Without torchrun a group of one process, so that there is one code path."""
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if is_cuda else torch.device("cpu")
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: if torchrun is killed, its ranks are asked to stop, wherever they wait
    if is_cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"  # gloo beside nccl: error messages travel as Python objects, checkpoints in the background
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=30)))  # torchrun listens before it starts ranks, unless it was killed since
        store.set_timeout(timedelta(minutes=30))
        store = dist.PrefixStore(f"try-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # torchrun's store still holds the addresses of ranks that died
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


class StopRequest:
    """Was this run asked to stop? By SIGTERM (a scheduler, torchrun), SIGHUP (a connection lost), by Ctrl-C, or because the torchrun that started it is gone. A second Ctrl-C is not asked."""

    def __init__(self):
        self.code, self.parent = 0, os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.code = self.code or (130 if number == signal.SIGINT else 143)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked(self):
        is_orphan = "RANK" in os.environ and os.getppid() != self.parent
        return {"stop_term": float(self.code == 143 or is_orphan), "stop_int": float(self.code == 130)}


# --- 3. model: meta device, freeze, shard, load ---------------------------------------------------------------------


def shard_model(model, device, trained, compute_dtype, replicate=1, is_kept=False, is_compiled=False):
    """Freeze what is not trained and shard in place with FSDP2: each decoder layer, then the rest in one group.

    trained: of PARTS, and "lora". compute_dtype: bf16 on CUDA, float32 on CPU. Trained parameters are float32 and cast when gathered, frozen ones are
    kept in compute_dtype: no gradient, no moments, half the memory. Gradients are summed over ranks in float32.
    replicate: copies of the sharded weights, along the first dimension of the mesh (HSDP). is_kept: a block stays gathered until its backward.
    The tower is not sharded: 0.6 GB that would be gathered in every step, and a rank without pictures must not wait for it. Nor are quantised
    weights, which are there for machines whose GPUs are few.
    """
    for name, param in model.named_parameters():
        param.requires_grad_(part_of(name) in trained)
        if not param.requires_grad and param.is_floating_point():
            param.data = param.data.to(compute_dtype)
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for module in quantized:
        module.scale = module.scale.to(compute_dtype)
    world_size = dist.get_world_size()
    mesh = init_device_mesh(device.type, (world_size,)) if replicate == 1 else init_device_mesh(
        device.type, (replicate, world_size // replicate), mesh_dim_names=("replicate", "shard"))
    how = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
               ignored_params={*model.vision_tower.parameters(), *(module.weight for module in quantized)})
    for layer in model.model.layers:
        if is_compiled:
            layer.compile()  # in place, so that names stay; before sharding, so that gathering is not traced
        fully_shard(layer, reshard_after_forward=not is_kept, **how)
    return fully_shard(model, **how)


def build_model(args, checkpoint, device, is_kept=False):
    """The sharded model with its weights, each rank having read only its own rows. -> (model, line that accounts for all tensors)"""
    config, sources, fresh = checkpoint  # of read_checkpoint
    config.image_mode = args.image_mode  # goes out with the weights, so that they are asked as they were trained
    with torch.device("meta"):
        model = Qilin(config)
        if args.quantize:
            quantize_linears(model, int(args.quantize[3:]))
        if args.lora:
            add_lora(model, args.lora, args.lora_alpha)
    model = shard_model(model, device, args.trained, torch.bfloat16 if device.type == "cuda" else torch.float32, args.replicate, is_kept, args.compile)
    return model, load_weights(model, sources, device, fresh, args.seed)


PEAK_TFLOPS = {"A100": 312, "A800": 312, "H100": 989, "H800": 989, "H200": 989, "H20": 148, "L40S": 362, "4090": 165, "3090": 71}  # bf16, dense, by the makers' sheets


def this_machine(args, device):
    """(Machine of this run, whether its peak is known): on a CPU all ranks share its memory, a fifth is left to others."""
    world_size, name, tflops = dist.get_world_size(), "", args.gpu_tflops
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
        tflops = tflops or next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    memory = args.gpu_memory * GIB if args.gpu_memory else min(gather(memory))  # every rank must cut its batch into as many pieces
    reserve = {} if device.type == "cuda" else dict(reserve=0.2 * memory)
    return Machine(world_size, memory, (tflops or 312) * 1e12, replicate=args.replicate, **reserve), tflops is not None


# --- 4. optimiser and schedule --------------------------------------------------------------------------------------


def lr_at(step, n_steps, peak, warmup_ratio):
    """Learning rate of a step, 0 <= step < n_steps: linear over ceil(warmup_ratio * n_steps) steps, then a half cosine to 0.
    As transformers' cosine schedule, but the first step is not spent at 0."""
    warmup = math.ceil(warmup_ratio * n_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


@dataclass
class Progress:
    """Where a run stands: with the seed it is all that order, schedule and checks depend on. Goes into every checkpoint."""

    step: int = 0              # optimiser steps done or skipped
    n_bad: int = 0             # of them skipped
    n_bad_in_a_row: int = 0
    n_grey: int = 0            # samples whose picture did not decode
    n_blind_in_a_row: int = 0  # steps most of whose pictures did not
    recent: list = field(default_factory=list)  # losses of the last 50 good steps

    def is_bad(self, loss, grad_norm):
        """Whether a step must not touch the weights: not finite, or a loss far above the last ones (3 times their mean and 2 more; nothing gentler is
        wrong for certain). loss and norm are sums over ranks, so all agree."""
        exploded = len(self.recent) >= 10 and loss > 3 * sum(self.recent) / len(self.recent) + 2
        is_bad = not math.isfinite(loss) or not math.isfinite(grad_norm) or exploded
        self.n_bad, self.n_bad_in_a_row = self.n_bad + is_bad, (self.n_bad_in_a_row + 1) * is_bad
        if not is_bad:
            self.recent = [*self.recent[-49:], loss]
        return is_bad


# --- 5. checkpoints and export --------------------------------------------------------------------------------------

TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)  # options of the state dict: frozen weights are in no checkpoint
STEP_FOLDER = re.compile(r"step-([1-9]\d*)$")


def check_metadata(path):
    """ValueError unless unpickling a checkpoint's .metadata, which torch does without asking, makes nothing but the descriptions of tensors."""
    class Checker(pickle.Unpickler):
        def find_class(self, module, name):
            found = getattr(sys.modules.get(module), name, None)  # no dotted names: they would lead from a module to what it imports
            if (module, name) in METADATA_CLASSES or isinstance(found, torch.dtype) or (isinstance(found, type) and found.__module__ == module == "torch.distributed.checkpoint.metadata"):
                return found
            raise ValueError(f"it names {module}.{name}, which no checkpoint needs")

    try:
        with open(path, "rb") as file:
            Checker(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises many kinds
        raise ValueError(f"{path}: cannot be read as a checkpoint's description ({one_line(error)[:200]})") from None


METADATA_CLASSES = {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
                    ("pathlib", "WindowsPath"), ("collections", "OrderedDict")}


class PlainLoadPlanner(DefaultLoadPlanner):
    """Torch's own, but what is no tensor (Adam's options) is unpickled without code."""

    def load_bytes(self, read_item, value):
        value = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], value)


def read_state(path):
    """(Progress, state.json) of a checkpoint; ValueError or OSError when it is not whole: a file missing or cut short, a state that no run wrote."""
    try:
        state = read_json(path / "state.json")
        progress = Progress(**state["progress"])
        is_whole = all((path / name).stat().st_size == size for name, size in state["files"].items()) and isinstance(state["setup"], dict) and isinstance(state["world_size"], int)
        numbers = [progress.step, progress.n_bad, progress.n_bad_in_a_row, progress.n_grey, progress.n_blind_in_a_row, *progress.recent]
        if is_whole and all(type(n) in (int, float) and n >= 0 for n in numbers) and type(progress.step) is int and progress.step > 0:
            return progress, state
    except (KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path}: not a whole checkpoint")


class Checkpoints:
    """--out/checkpoints/step-N: weights trained, Adam's moments, RNG, progress and setup, one file a rank, resumable with any number of ranks.

    Written by a background thread into step-N.partial from a copy in host memory, and renamed when every rank is done, so that a step-N is whole or not there;
    a kill at any moment leaves the earlier ones as they are. The newest --keep stay.
    """

    def __init__(self, args, model, optimizer, setup):
        self.args, self.model, self.optimizer, self.setup, self.folder = args, model, optimizer, setup, args.out / "checkpoints"
        self.group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))  # its own: on the default group it would meet training's collectives
        self.writing = None  # (future, progress)

    def tensors(self, with_rng=True):
        is_new = not self.optimizer.state
        weights, moments = get_state_dict(self.model, self.optimizer, options=TRAINED_ONLY)
        for state in self.optimizer.state.values() if is_new else ():  # an optimiser that has done nothing is given its state by a step with zero gradients, which it must not count
            state["step"].zero_()
        rng = {f"cpu-{dist.get_rank()}": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng[f"cuda-{dist.get_rank()}"] = torch.cuda.get_rng_state()
        return {"model": weights, "optimizer": moments, **({"rng": rng} if with_rng else {})}

    def whole(self):
        """{step: folder} of the checkpoints of which nothing is missing, oldest first."""
        found = {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            try:
                if (match := STEP_FOLDER.match(path.name)) and read_state(path)[0].step == int(match[1]):
                    found[int(match[1])] = path
            except USER_ERRORS:
                continue
        return dict(sorted(found.items()))

    def clean(self):
        """Remove what an interrupted save or removal left; a step-N that is not whole was damaged by something else and only loses its name."""
        whole = self.whole().values()
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else ():
            if re.match(r"step-\d+\.(partial|old)$", path.name):
                print0(f"{path} is not whole: removed")
                shutil.rmtree(path, ignore_errors=True)
            elif STEP_FOLDER.match(path.name) and path not in whole:
                print0(f"{path} is not whole: renamed to {path.name}.damaged")
                replace_folder(path, path.with_name(path.name + ".damaged"))

    def put_aside(self, paths, why):
        """Move checkpoints of another course of this run out of the way, to checkpoints.N beside: by their numbers they would pass for newer ones."""
        if paths:
            aside = next(p for i in range(1, 10**6) if not (p := self.folder.with_name(f"checkpoints.{i}")).exists())
            aside.mkdir()
            for path in paths:
                path.rename(aside / path.name)
            print0(f"{why}: {', '.join(path.name for path in paths)} moved to {aside}")

    def save(self, progress, wait=False):
        """Start writing a checkpoint; what a step waits for is the copy to host memory. An earlier one under way is finished first."""
        self.finish()
        partial = self.folder / f"step-{progress.step}.partial"

        def prepare():
            if progress.step in self.whole():  # resumed from it, and stopped before another step; later ones of another course are put aside
                return False
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            return True

        if progress.step and on_rank0(prepare):
            writer = FileSystemWriter(partial, per_thread_copy_ahead=0)  # what it writes is in host memory already: nothing to copy ahead, and no CUDA context in its thread
            self.writing = async_save(self.tensors(), storage_writer=writer, process_group=self.group), Progress(**asdict(progress)), partial
        if wait:
            self.finish()

    def progress(self):
        """For sum_over_ranks: has this rank written its part? When all have, finish() only gives the name and removes what is too many."""
        return {"written": float(self.writing is not None and self.writing[0].done())}

    def finish(self):
        """Wait until every rank has written, then give the folder its name. A disk that is full stops all ranks with one line and exit code 1."""
        if self.writing is None:
            return
        (future, progress, partial), self.writing = self.writing, None

        def written():
            try:
                future.result()
            except (CheckpointException, Exception) as error:  # the former is no Exception
                cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) and error.failures else error
                shutil.rmtree(partial, ignore_errors=True)
                raise OSError(getattr(cause, "errno", None) or errno.EIO, f"checkpoint could not be written ({one_line(cause)[:120]}; {shutil.disk_usage(self.folder).free / 1e9:.1f} GB free); the earlier ones are whole", str(partial)) from None

        def seal():
            files = {path.name: path.stat().st_size for path in partial.iterdir()}
            write_json(partial / "state.json", {"progress": asdict(progress), "world_size": dist.get_world_size(), "setup": self.setup, "files": files})
            for path in (partial / "state.json", partial, self.folder):  # the tensors' files were synced by their writer
                if path == self.folder:
                    replace_folder(partial, partial.with_suffix(""))
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            for step in list(self.whole())[: -self.args.keep]:
                gone = self.folder / f"step-{step}.old"
                (self.folder / f"step-{step}").rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

        together(written)
        on_rank0(seal)

    def resume(self):
        """Progress from the checkpoint that --resume names, its tensors being loaded; a new one where there is none."""
        path = on_rank0(self.find)
        if path is None:
            return Progress()
        progress, saved = together(read_state, path)
        on_rank0(self.compare, saved["setup"], path)
        is_same = saved["world_size"] == dist.get_world_size()
        state = self.tensors(with_rng=is_same)
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)  # what is wrong is said once, by us
        together(check_metadata, path / ".metadata")
        try:
            load_sharded(state, storage_reader=FileSystemReader(path), planner=PlainLoadPlanner(), process_group=self.group)
        except CheckpointException as error:
            leave(2, f"{path} cannot be loaded: {one_line(next(iter(error.failures.values()))[0])[:300]}")
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=TRAINED_ONLY)
        if is_same:
            torch.set_rng_state(state["rng"][f"cpu-{dist.get_rank()}"])
            if f"cuda-{dist.get_rank()}" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"][f"cuda-{dist.get_rank()}"])
        print0(f"going on after step {progress.step} ({path}, written by {saved['world_size']} ranks)")
        return progress

    def find(self):
        """The folder to resume from, or None."""
        self.clean()
        steps = self.whole()
        if self.args.resume not in ("auto", "never"):
            path = Path(self.args.resume)
            if not (path / "state.json").is_file():
                raise FileNotFoundError(f"--resume {path}: no checkpoint there (a folder step-N with state.json)")
            inside = next((step for step, folder in steps.items() if folder.samefile(path)), -1)
            self.put_aside([folder for step, folder in steps.items() if step > inside], f"--resume {path}")
            return path
        if self.args.resume == "never":
            self.put_aside([*steps.values(), *(path for name in ("log.jsonl", "samples.jsonl") if (path := self.args.out / name).is_file())] if steps else [], "--resume never")
            return None
        return list(steps.values())[-1] if steps else None

    def compare(self, old, path):
        """ValueError that says what differs between this run and the one that wrote a checkpoint."""
        differ = [f"{name}: {old.get(name)} there, {value} now" for name, value in json.loads(json.dumps(self.setup)).items() if old.get(name) != value]
        if differ and not self.args.allow_changes:
            raise ValueError(f"{path} is of a run with another setup ({'; '.join(differ)[:600]}): start with the old one, or another --out, or --allow-changes to go on all the same")


def describe_setup(args, config, tokenizer, sources, data):
    """What decides a run's numbers, to be compared when it goes on. Weights by the names, shapes and first rows of their tensors: reading 26 GB would take minutes."""
    sha256 = hashlib.sha256()
    for files, parts in sources:
        for name in sorted(name for name in files.tensors if part_of(name) in parts):
            sha256.update(f"{name} {files.shape(name)} ".encode() + files.rows(name, 0, 1).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    names = ("stage", "batch_size", "lr", "warmup_ratio", "weight_decay", "max_grad_norm", "epochs", "max_steps", "max_length", "template", "image_mode", "seed",
             "lora", "lora_alpha", "quantize")
    return {**{name: getattr(args, name) for name in names}, "projector_type": config.projector_type, "data": data, "tokenizer": digest(tokenizer.path), "weights": sha256.hexdigest()}


def lock(out):
    """Hold --out/.lock until this process ends. While the ranks of an earlier start still save what they have, wait for them."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / ".lock", "w")
    for second in range(660):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if second == 5:
                print0(f"another run is still writing to {out}: waiting for it, up to 11 minutes")
            time.sleep(1)
        except OSError:  # a file system without locks
            return file
    raise ValueError(f"another run is writing to {out}: stop it, or give another --out")


def export(args, model, tokenizer):
    """final/: what the next stage and sample.py read. Tensors are gathered one at a time; bf16 when trained on CUDA."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    final = args.out / "final"
    if args.trained != ("mm_projector",):
        return save_qilin(model, tokenizer, final, dtype, f"a language model and a projector tuned in stage {args.stage}")
    tensors = {"model." + name: full for name, full in full_tensors(model, "mm_projector.", dtype)}
    if dist.get_rank() == 0:
        partial = final.with_name("final.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_tensors(tensors, partial / "projector.safetensors")
        replace_folder(partial, final)
    dist.barrier()


# --- 6. main --------------------------------------------------------------------------------------------------------


def prepare(args):
    """What can go wrong before data is read: --out, the weights' headers, the tokenizer. -> (checkpoint of read_checkpoint, Tokenizer)"""
    if not args.out.name or (args.out.exists() and not args.out.is_dir()):
        raise ValueError(f"--out {str(args.out)!r} is no folder")
    if dist.get_world_size() % args.replicate:
        raise ValueError(f"--replicate {args.replicate} does not divide {dist.get_world_size()} ranks")
    check_replaceable(args.out / "final", FINAL_FILES[args.stage])
    if os.path.lexists(args.out / "checkpoints") and not (args.out / "checkpoints").is_dir():
        raise ValueError(f"{args.out / 'checkpoints'} is no folder: remove it")
    checkpoint = read_checkpoint(args.model, llm=args.llm, vision=args.vision, projector=args.projector, projector_type=args.projector_type)
    if args.max_length > checkpoint[0].text.max_position_embeddings:
        raise ValueError(f"--max-length {args.max_length} is more than the model's {checkpoint[0].text.max_position_embeddings} positions")
    return checkpoint, Tokenizer(args.llm or args.model)


@dataclass
class Run:
    """What the loop works with."""

    args: argparse.Namespace
    device: torch.device
    dataset: Dialogs
    held_out: Dialogs | None
    batches: list                 # global batches of the whole run, one a step
    micro_batches: list           # of each step, this rank's
    sizes: Sizes
    fit: Fit
    blocks_for: object            # slots of a micro-batch -> blocks that must recompute
    model: Qilin
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    trained: list
    checkpoints: Checkpoints
    progress: Progress
    log: Log
    lock: object                  # an open file: closed, it would let another run in


def start(args):
    """Everything before the first step; None when the run is finished already."""
    rank, world_size, device = setup_distributed()
    checkpoint, tokenizer = together(prepare, args)
    held = together(lambda: lock(args.out) if rank == 0 else None)
    if on_rank0(lambda: (args.out / "final" / FINAL_FILES[args.stage]).is_file()):
        print0(f"{args.out / 'final'} is there: this run is finished (another --out, or remove the folder, to train again)")
        return None
    config = checkpoint[0]
    dataset, held_out = (files and Dialogs(files, tokenizer, config.n_image_tokens, config.vision.image_size, args) for files in (args.data, args.val_data and [args.val_data]))
    batches = all_batches(args, dataset.lengths)
    sizes = Sizes(config, args.trained, args.lora, args.quantize, 2 if device.type == "cuda" else 4)
    machine, is_peak_known = this_machine(args, device)
    per_gpu, reshard = math.ceil(max(map(len, batches)) / world_size), {"auto": None, "always": False, "never": True}[args.reshard]
    fit = on_rank0(choose, sizes, machine, dataset.lengths, batches, args.micro_batch_size, reshard, STAGES[args.stage]["micro_batch_size"])
    is_tight, fit = fit is None, fit or Fit(args.micro_batch_size or 1, args.reshard == "never", deepest=sizes.L)

    @functools.cache
    def blocks_for(slots):  # recompute in as few blocks as this micro-batch's tokens need: most batches are short, and each block spared is a third of its work
        if args.checkpoint_layers is not None:
            return args.checkpoint_layers
        n = blocks_to_checkpoint(sizes, world_size // args.replicate, slots, machine.budget, is_kept=fit.is_kept, is_accumulating=per_gpu > fit.micro_batch_size, n_labels=LOSS_CHUNK)
        return sizes.L if n is None else n

    model, accounting = together(build_model, args, checkpoint, device, fit.is_kept)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=args.weight_decay, fused=True)
    checkpoints = Checkpoints(args, model, optimizer, together(describe_setup, args, config, tokenizer, checkpoint[1], dataset.digests))
    progress = checkpoints.resume()
    if progress.step > len(batches):
        leave(2, f"the checkpoint is of step {progress.step}, this run has only {len(batches)}")
    if progress.step == 0:  # a picture lost since does not keep a run from going on
        for dialogs in filter(None, (dataset, held_out)):
            together(dialogs.check_pictures)
    if args.workers is None:
        args.workers = min(8, max(0, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    n_params = {"all": sum(p.numel() for p in model.parameters()), "trained": sum(p.numel() for p in trained)}
    data = {str(rows.path): sha256 for dialogs in filter(None, (dataset, held_out)) for rows, sha256 in zip(dialogs.files, dialogs.digests)}
    log = together(Log, args, len(batches), n_params, data, progress.step, machine.flops * world_size if is_peak_known else None)
    print0(f"stage {args.stage}: {n_params['trained']:,} of {n_params['all']:,} parameters trained; {accounting}")
    print0(f"{len(dataset):,} samples ({dataset.n_dropped} dropped, {dataset.n_cut} cut), median {int(np.median(dataset.lengths))} tokens; {len(batches)} steps of "
           f"{args.batch_size} on {world_size} ranks, {device.type}; {describe_fit(fit, sizes.L, per_gpu)}" + "; by --plan this may not fit into memory" * is_tight)
    micro_batches = [cut_batch(batch, rank, world_size, fit.micro_batch_size) for batch in batches]
    return Run(args, device, dataset, held_out, batches, micro_batches, sizes, fit, blocks_for, model, tokenizer, optimizer, trained, checkpoints, progress, log, held)


def stop_if_needed(run, n, parts):
    """Leave, all ranks in the same step and with a checkpoint: when asked to, when a row cannot be read, when the pictures are gone. n: sums of count() and asked()."""
    is_mostly = n["grey"] > n["pictures"] / 2
    run.progress.n_blind_in_a_row = (run.progress.n_blind_in_a_row + 1) * is_mostly
    is_blind = is_mostly and (n["grey"] > 4 or run.progress.n_blind_in_a_row >= 3)  # a folder that is not mounted is no picture that does not decode
    if n["errors"] or n["stop_term"] or n["stop_int"] or is_blind:
        run.checkpoints.save(run.progress, wait=True)
        together(check_batches, parts)
        if is_blind:
            leave(2, f"step {run.progress.step + 1}: {int(n['grey'])} of its samples have no picture that can be read ({parts[0]['grey'][:1]}): is --images {run.args.images} still there?")
        leave(143 if n["stop_term"] else 130, f"stopped after step {run.progress.step} of {len(run.batches)}; the same command goes on from there")
    if n["grey"]:
        names = [name for rank in gather([name for batch in parts for name in batch["grey"]]) for name in rank]
        run.progress.n_grey += len(names)
        run.log.grey(run.progress.step + 1, names)


def look(run, step):
    """Held-out loss and some answers."""
    if run.held_out:
        run.checkpoints.finish()  # should this end the run, a checkpoint on its way is not lost
        try:
            run.log.held_out_loss(step, evaluate(run.model, run.held_out, run.fit.micro_batch_size, run.device))
            answer_held_out(run.model, run.held_out, run.args, step, run.device)
        except ValueError as error:  # the same on all ranks
            run.checkpoints.save(run.progress, wait=True)
            leave(2, one_line(error))


def train(run):
    """The loop. One step is one mean over labelled tokens, however its batch is cut into ranks and micro-batches."""
    args, model, optimizer, progress, world_size = run.args, run.model, run.optimizer, run.progress, dist.get_world_size()
    stream, stop = load_ahead(run.dataset, [micro for step in run.micro_batches[progress.step :] for micro in step], args.workers), StopRequest()
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
        n = sum_over_ranks({**count(parts), **stop.asked(), **run.checkpoints.progress()}, run.device)
        if n["written"] == world_size:
            run.checkpoints.finish()
        stop_if_needed(run, n, parts)

        step_loss = 0.0
        for part in parts:  # each backward sums its gradients over ranks: kept for the last one, they would stand whole on every rank
            model.model.n_checkpointed = run.blocks_for(part["input_ids"].numel())
            loss = model(**to_device(part, run.device), reduction="sum") / max(n["targets"], 1)
            (loss * world_size).backward()  # FSDP averages gradients over ranks, and we want their sum
            step_loss += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(run.trained, args.max_grad_norm or math.inf).full_tensor()
        dist.all_reduce(step_loss)

        loss, grad_norm = step_loss.item(), grad_norm.item()  # the same numbers on all ranks
        is_taught = n["targets"] > 0  # not when all its pictures were lost: Adam would move the weights all the same
        if is_bad := is_taught and progress.is_bad(loss, grad_norm):
            run.log.bad_step(step + 1, loss, grad_norm, run.dataset, batch)
        elif is_taught:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step = step + 1
        if is_taught and not is_bad:
            work = flops(run.sizes, run.dataset.lengths[batch], n["pictures"], n["targets"])
            run.log.step(step + 1, loss, lr, grad_norm, time.perf_counter() - tic, n, work, run.device)
        if progress.n_bad_in_a_row >= args.max_bad_steps:
            run.checkpoints.finish()
            leave(1, f"step {step + 1}: {args.max_bad_steps} steps in a row had a loss that is not finite or explodes (now {loss:.4g}, gradient norm {grad_norm:.4g}): "
                     "stopped, their samples are in log.jsonl (a smaller --lr may help)")
        if progress.step % args.save_every == 0 and progress.step < len(run.batches):
            run.checkpoints.save(progress)


def run_training(args):
    run = start(args)
    if run:
        train(run)
        run.checkpoints.save(run.progress, wait=True)  # first: an export that fails costs nothing then
        export(args, run.model, run.tokenizer)
        look(run, len(run.batches))
        run.log.close()
        print0(f"done: {args.out / 'final'}, {args.out / 'loss.png'}"
               + f"; {run.progress.n_bad} steps skipped" * bool(run.progress.n_bad) + f"; {run.progress.n_grey} samples had no picture that decodes" * bool(run.progress.n_grey))
    dist.destroy_process_group()


def run_guarded(args):
    """run_training, with one line for what ends it from outside: memory, or a rank that is gone."""
    try:
        run_training(args)
    except torch.OutOfMemoryError as error:
        line, hint = one_line(error)[:200], "try a smaller --micro-batch-size, or --checkpoint-layers 999; --plan shows what takes the memory"
    except (dist.DistError, RuntimeError) as error:
        if "DataLoader" in str(error):
            line, hint = one_line(error)[:200], "a process that decodes pictures is gone or stuck: too little memory, or /dev/shm is small (docker: --shm-size 16g), or try fewer --workers"
        elif not isinstance(error, dist.DistError) and not re.search("gloo|Connection|peer|NCCL", str(error)):
            raise
        else:
            line, hint = one_line(error)[:200], "another rank is gone; started again, the run goes on from its newest checkpoint"
    else:
        return
    print(f"train.py: rank {os.environ.get('RANK', 0)}: {line}: {hint}", file=sys.stderr, flush=True)
    os._exit(1)  # what still waits for the other ranks would wait for ever


def main():
    if os.environ.get("RANK", "0") == "0":
        args = parse_args()
        if args.smoke:
            from smoke import run_smoke
            return run_smoke()
        if args.plan:
            setup_distributed()
            return run_plan(args, STAGES[args.stage]["micro_batch_size"], args.trained if args.stage == 1 or args.lora else LORA["trained"])
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
