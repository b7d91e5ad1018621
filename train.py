"""Train Qilin-Med-VL in the paper's two stages (arXiv 2310.17956, section 4.2).

    torchrun --nproc_per_node 8 train.py --stage 1        align: the projector alone learns to caption
    torchrun --nproc_per_node 8 train.py --stage 2        tune: projector and language model learn to answer

One process works too: `python train.py …`. Without options: the paper's settings, weights in weights/, data in data/chimed/ (see README).
--out holds run.json, log.jsonl (a line a step), loss.png, samples.jsonl, checkpoints/ and, at the end, final/: stage 1's projector.safetensors,
stage 2's whole model as a folder that sample.py, transformers and vLLM load.

One step is one mean over the labelled tokens of the global batch, however it is cut into ranks and micro-batches; the released code takes
a mean of means, which weighs tokens by how their batch happened to be cut.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.distributed.checkpoint import save as save_sharded
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from qilin_min import (IGNORE_INDEX, TEMPLATES, USER_ERRORS, Qilin, Tokenizer, answer_ids, check_ranges, check_replaceable, count_images, encode_conversation, encode_prompt,
                       full_tensors, load_weights, one_line, pad_rows, part_of, preprocess_image, read_checkpoint, read_rows, replace_folder,
                       row_pictures, run_cli, save_qilin, save_tensors, write_json)

# --- 1. the two stages ----------------------------------------------------------------------------------------------
# paper, section 5.2, and the released scripts; every row can be overridden by the option of the same name

STAGES = {
    1: dict(trained=("mm_projector",), lr=1e-3, batch_size=256, micro_batch_size=32, data="data/chimed/alignment.json", projector=None, out="out/stage1"),
    2: dict(trained=("mm_projector", "llm"), lr=2e-5, batch_size=128, micro_batch_size=16, data="data/chimed/instruction.json",
            projector="out/stage1/final/projector.safetensors", out="out/stage2"),
}


FINAL_FILES = {1: "projector.safetensors", 2: "config.json"}  # in --out/final, of a finished run


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", type=int, choices=STAGES, required=True, help="1: projector on captions; 2: projector and language model on questions")
    add("--llm", default=None, help="LLaMA folder (default weights/Llama2-Chinese-13b-Chat)")
    add("--vision", default=None, help="CLIP folder (default weights/clip-vit-large-patch14-336)")
    add("--model", default=None, help="a whole model to go on from, in place of --llm and --vision")
    add("--projector", default=None, help="file to start from, or `fresh` (default: the one in --model; else stage 1 fresh, stage 2 out/stage1/final/projector.safetensors)")
    add("--projector-type", default="linear", choices=("linear", "mlp2x_gelu"), help="of a fresh one: the paper's, or the released weights' (default %(default)s)")
    add("--data", nargs="+", default=None, help=".json lists or .jsonl of {id, image, conversations} (default by stage: data/chimed/…)")
    add("--images", default="data/chimed/images", help="folder that the data's picture names are relative to (default %(default)s)")
    add("--out", default=None, help="folder to write (default out/stage1, out/stage2)")
    add("--batch-size", type=int, default=None, help="samples a step over all ranks (default 256, 128)")
    add("--micro-batch-size", type=int, default=None, help="samples a rank holds at one time; more a step are accumulated (default 32, 16)")
    add("--lr", type=float, default=None, help="peak learning rate (default 1e-3, 2e-5)")
    add("--warmup-ratio", type=float, default=0.03, help="share of the steps before the peak (default %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="(default %(default)s)")
    add("--max-grad-norm", type=float, default=1.0, help="gradient norm is clipped there, 0: never (default %(default)s)")
    add("--epochs", type=int, default=1, help="(default %(default)s)")
    add("--max-steps", type=int, default=0, help="stop the run after this many steps; the schedule ends there as well (0: by --epochs)")
    add("--max-length", type=int, default=2048, help="tokens of a sample, pictures included; the end of longer ones is cut (default %(default)s)")
    add("--template", choices=TEMPLATES, default="v1", help="v1: dialogs, as in the paper; plain: picture then caption, the released stage 1")
    add("--image-mode", choices=("pad", "crop"), default="pad", help="how a picture becomes square (default %(default)s)")
    add("--checkpoint-layers", type=int, default=None, help="LLM layers that recompute activations in backward (default all; 0 none)")
    add("--val-data", default=None, help="held-out file: its loss is logged, some of its questions are answered")
    add("--eval-every", type=int, default=500, help="steps between two looks at --val-data (default %(default)s; also before and after)")
    add("--samples", type=int, default=4, help="questions of --val-data answered at each look (default %(default)s)")
    add("--log-every", type=int, default=1, help="steps between two printed lines; log.jsonl has every step (default %(default)s)")
    add("--workers", type=int, default=None, help="processes a rank that decode pictures ahead (default: spare cores, at most 8)")
    add("--seed", type=int, default=0, help="of the order of samples and of a fresh projector (default %(default)s)")
    args = parser.parse_args(argv)
    stage, most = STAGES[args.stage], 10**9
    for name in ("lr", "batch_size", "micro_batch_size", "out"):
        if getattr(args, name) is None:
            setattr(args, name, stage[name])
    args.data, args.out = args.data or [stage["data"]], Path(args.out)
    if args.model is None:
        args.llm = args.llm or "weights/Llama2-Chinese-13b-Chat"
        args.vision = args.vision or "weights/clip-vit-large-patch14-336"
        if args.projector is None and stage["projector"]:
            args.projector = stage["projector"]
            if not Path(args.projector).is_file():
                raise FileNotFoundError(f"stage {args.stage} starts from {args.projector}, which is not there: run --stage 1, or give --projector FILE or --projector fresh")
    check_ranges(args, lr=(0, 10), batch_size=(1, most), micro_batch_size=(1, most), epochs=(1, 10**4), max_steps=(0, most), max_length=(2, most), warmup_ratio=(0, 1),
                 weight_decay=(0, 1), max_grad_norm=(0, most), checkpoint_layers=(0, most), eval_every=(1, most), samples=(0, most), log_every=(1, most), workers=(0, 256), seed=(0, 2**31))
    return args


# --- 2. ranks -------------------------------------------------------------------------------------------------------


def setup_distributed():
    """(rank, world size, device). Without torchrun a group of one process, so that there is one code path."""
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"  # gloo beside nccl: error messages travel as Python objects
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


def print0(*values):
    if dist.get_rank() == 0:
        tqdm.write(" ".join(map(str, values)))
        sys.stdout.flush()


def together(function, *args):
    """function(*args) on every rank; if it raises what a user can cause on any of them, all ranks stop: one line from rank 0, exit code 2."""
    result, error = None, None
    try:
        result = function(*args)
    except USER_ERRORS as raised:
        error = one_line(raised)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if first := next((e for e in errors if e), None):
        if dist.get_rank() == 0:
            print(f"train.py: {first}", file=sys.stderr, flush=True)
        dist.destroy_process_group()
        sys.exit(2)
    return result


def stop_unless_finite(step, loss, grad_norm):
    """Exit code 1 on all ranks, before the weights are touched, when the loss or the gradient is inf or nan: both are the same on every rank."""
    if not (loss.isfinite() and grad_norm.isfinite()):
        if dist.get_rank() == 0:
            print(f"train.py: step {step}: loss {loss.item():.4g}, gradient norm {grad_norm.item():.4g}; stopped (a smaller --lr may help)", file=sys.stderr, flush=True)
        dist.destroy_process_group()
        sys.exit(1)


def sum_over_ranks(values, device):
    """The sums over ranks of a list of numbers, as Python floats (exact for counts up to 2^53)."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


# --- 3. data: rows -> samples -> batches ----------------------------------------------------------------------------


class Dialogs(torch.utils.data.Dataset):
    """Samples of the data files; indexed by a list of row numbers, it gives their batch.

    Every row is checked and tokenised once at the start: a bad row or a picture that is not there stops the run before the first step.
    lengths int32 (n,): tokens of each sample kept. Samples of which max_length leaves no label are dropped and counted.
    """

    def __init__(self, files, tokenizer, n_image_tokens, image_size, args):
        self.tokenizer, self.n_image_tokens, self.image_size, self.args = tokenizer, n_image_tokens, image_size, args
        self.rows, lengths, self.n_dropped, self.n_cut = [], [], 0, 0
        for file in files:
            for i, row in enumerate(tqdm(read_rows(file), desc=f"tokenising {Path(file).name}", unit=" rows", disable=None if dist.get_rank() == 0 else True)):
                try:
                    ids, labels = self.encode(row)
                    row_pictures(row, args.images)
                    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair stops here, not when an answer is logged
                except USER_ERRORS as error:
                    name = f" (id {row['id']})" if isinstance(row, dict) and "id" in row else ""
                    raise ValueError(f"{file}: row {i}{name}: {one_line(error)}") from None
                if all(label == IGNORE_INDEX for label in labels[1:]):
                    self.n_dropped += 1
                    continue
                n_ends = labels.count(tokenizer.eos_id)  # one an answer, so that a missing one tells a cut
                self.n_cut += len(ids) == args.max_length if args.template == "plain" else n_ends < len(row["conversations"]) // 2
                self.rows.append(row)
                lengths.append(len(ids))
        if not self.rows:
            raise ValueError(f"{', '.join(map(str, files))}: no sample to learn from"
                             + f" ({self.n_dropped} dropped: longer than --max-length {args.max_length} before any answer)" * bool(self.n_dropped))
        self.lengths = np.array(lengths, dtype=np.int32)

    def encode(self, row):
        if not isinstance(row, dict):
            raise ValueError("not an object with id, image and conversations")
        return encode_conversation(row.get("conversations"), self.tokenizer, self.n_image_tokens, self.args.template, self.args.max_length)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, batch):
        """A batch from row numbers: input_ids, labels (B, T), pixel_values (M, 3, H, W) or None; no rows at all give one row without labels,
        so that a rank with nothing to do still takes part in the collectives. An error comes back as text under "error"."""
        try:
            samples = [self.encode(self.rows[i]) for i in batch] or [([self.tokenizer.bos_id] * 2, [IGNORE_INDEX] * 2)]
            pictures = [preprocess_image(path, self.image_size, self.args.image_mode) for i in batch for path in row_pictures(self.rows[i], self.args.images)]
        except USER_ERRORS as error:
            return {"error": one_line(error)}
        input_ids, labels = pad_rows([ids for ids, _ in samples], 0), pad_rows([labels for _, labels in samples], IGNORE_INDEX)
        return {"input_ids": input_ids, "labels": labels, "pixel_values": torch.stack(pictures) if pictures else None,
                "n_tokens": sum(len(ids) for ids, _ in samples) if batch else 0, "n_slots": input_ids.numel()}


def batch_order(lengths, batch_size, seed, epoch, window=50):
    """The global batches of an epoch: lists of row numbers, each row once, the longest sample first within a batch.

    A pure function of its arguments, whatever the number of ranks. Rows are shuffled, then sorted by length in windows of 50 batches, so that a
    batch holds samples alike in length and little is padding; then the batches are shuffled. The batch of the longest sample
    comes first: a run that will not fit in memory fails at once. The last, smaller batch stays last: nothing is dropped.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), window * batch_size):
        part = order[start : start + window * batch_size]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[i : i + batch_size].tolist() for i in range(0, len(part), batch_size)]
    tail = [batches.pop()] if len(batches[-1]) < batch_size else []
    batches = [batches[i] for i in rng.permutation(len(batches))]
    if batches:
        batches.insert(0, batches.pop(int(np.argmax([lengths[batch[0]] for batch in batches]))))
    return batches + tail


def cut_batch(batch, rank, world_size, micro_batch_size):
    """This rank's micro-batches of a global batch: every world_size-th sample, so that ranks get like lengths. As many on each rank; some may be empty."""
    mine = batch[rank::world_size]
    n = math.ceil(math.ceil(len(batch) / world_size) / micro_batch_size)
    return [mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(n)]


def load_ahead(dataset, micro_batches, workers):
    """An iterator over the batches of a list of row-number lists, decoded by worker processes ahead of time."""
    return iter(torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=micro_batches, num_workers=workers, prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available()))


def check_batches(parts):
    """ValueError when the loader could not make one of the batches."""
    for batch in parts:
        if "error" in batch:
            raise ValueError(batch["error"])


def count(parts):
    """[errors, labelled tokens that the loss counts, real tokens, tokens with padding] of a list of batches."""
    good = [batch for batch in parts if "error" not in batch]
    return [len(parts) - len(good), sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in good),
            sum(batch["n_tokens"] for batch in good), sum(batch["n_slots"] for batch in good)]


def to_device(batch, device):
    return {k: None if batch[k] is None else batch[k].to(device, non_blocking=True) for k in ("input_ids", "pixel_values", "labels")}


# --- 4. model: meta device, freeze, shard, load ---------------------------------------------------------------------


def shard_model(model, device, trained, compute_dtype):
    """Freeze what is not trained and shard in place with FSDP2: each decoder layer, then the rest in one group.

    compute_dtype: bf16 on CUDA, float32 on CPU. Trained parameters are float32 and cast when gathered, frozen ones are kept in compute_dtype;
    gradients are summed over ranks in float32.
    The tower is not sharded: 0.6 GB that would be gathered in every step, and a rank without pictures must not wait for it.
    """
    for name, param in model.named_parameters():
        param.requires_grad_(part_of(name) in trained)
    for module in (model.vision_tower, model.mm_projector, model.model, model.lm_head):
        if module is not None and not any(p.requires_grad for p in module.parameters()):
            module.to(compute_dtype)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=set(model.vision_tower.parameters()))


def build_model(args, checkpoint, device):
    """The sharded model with its weights, each rank having read only its own rows. -> (model, line that accounts for all tensors)"""
    config, sources, fresh = checkpoint  # of read_checkpoint
    config.image_mode = args.image_mode  # goes out with the weights, so that they are asked as they were trained
    with torch.device("meta"):
        model = Qilin(config)
    model = shard_model(model, device, STAGES[args.stage]["trained"], torch.bfloat16 if device.type == "cuda" else torch.float32)
    n_layers = config.text.num_hidden_layers
    model.model.n_checkpointed = n_layers if args.checkpoint_layers is None else args.checkpoint_layers
    return model, load_weights(model, sources, device, fresh, args.seed)


# --- 5. optimiser and schedule --------------------------------------------------------------------------------------


def lr_at(step, n_steps, peak, warmup_ratio):
    """Learning rate of a step, 0 <= step < n_steps: linear over ceil(warmup_ratio * n_steps) steps, then a half cosine to 0.
    As transformers' cosine schedule, but the first step is not spent at 0."""
    warmup = math.ceil(warmup_ratio * n_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


# --- 6. what one sees -----------------------------------------------------------------------------------------------


def draw_curves(path, title, train, held_out):
    """loss.png: training loss a step (thin, and its running mean), held-out loss as dots; [(step, loss)] each, loss on a log scale."""
    width, height, left, top, right, bottom = 800, 480, 70, 40, 780, 440
    image = Image.new("RGB", (width * 2, height * 2), "white")  # drawn twice as large, then halved: smooth lines
    pen = ImageDraw.Draw(image)
    points = [p for p in train + held_out if math.isfinite(p[1])]
    if not points:
        return
    x_max = max(1, max(step for step, _ in points))
    low, high = (f(max(loss, 1e-6) for _, loss in points) for f in (min, max))
    low, high = low / 1.1, high * 1.1

    def at(step, loss):
        x = left + (right - left) * step / x_max
        y = bottom - (bottom - top) * math.log(min(max(loss, low), high) / low) / math.log(high / low)
        return 2 * x, 2 * y

    ticks = [d * 10.0**e for e in range(-7, 10) for d in (range(1, 10) if high / low < 6 else (1, 2, 5) if high / low < 200 else (1,)) if low <= d * 10.0**e <= high]
    for loss in ticks or [low, high]:
        pen.line((*at(0, loss), *at(x_max, loss)), fill="#e4e4e4", width=2)
        pen.text((2 * left - 12, at(0, loss)[1]), f"{loss:.3g}", fill="#444444", anchor="rm", font_size=24)
    for step in sorted({round(x_max * k / 5) for k in range(6)}):
        pen.text((at(step, low)[0], 2 * bottom + 12), f"{step}", fill="#444444", anchor="mt", font_size=24)
    smooth, total, weight = [], 0.0, 0.0  # an exponential mean that starts without a bias to its first value
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
    pen.text((2 * left, 2 * top - 16), f"{title}: loss by step (log scale), blue training, red held out", fill="#222222", anchor="ls", font_size=28)
    partial = path.with_name(path.name + ".partial")
    image.resize((width, height), Image.Resampling.LANCZOS).save(partial, format="PNG")
    partial.rename(path)


class Log:
    """run.json, log.jsonl, loss.png and the printed lines, all from rank 0."""

    def __init__(self, args, n_steps, n_params):
        self.args, self.n_steps, self.train, self.held_out, self.is_rank0 = args, n_steps, [], [], dist.get_rank() == 0
        if self.is_rank0:
            args.out.mkdir(parents=True, exist_ok=True)
            write_run_json(args, n_params)
            (args.out / "samples.jsonl").unlink(missing_ok=True)
            self.file = open(args.out / "log.jsonl", "w", encoding="utf-8")
        self.bar = tqdm(total=n_steps, desc=f"stage {args.stage}", unit="step", disable=None if self.is_rank0 else True)
        self.drawn = time.monotonic()

    def write(self, **entry):
        if self.is_rank0:
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self.file.flush()

    def step(self, step, loss, lr, grad_norm, seconds, n_tokens, n_slots, n_targets, device):
        """One line for step number `step` (1 is the first)."""
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        entry = dict(step=step, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=n_tokens / seconds, padding=1 - n_tokens / n_slots,
                     memory_gib=memory / 2**30, n_targets=int(n_targets), seconds=seconds)
        self.write(**entry)
        self.train.append((step, loss))
        self.bar.update()
        if step % self.args.log_every == 0 or step in (1, self.n_steps):
            print0(f"step {step}/{self.n_steps} | loss {loss:.4f} | lr {lr:.2e} | grad {grad_norm:.2f} | {entry['tokens_per_s']:,.0f} tok/s | "
                   f"padding {entry['padding']:.1%} | {entry['memory_gib']:.2f} GiB | {seconds:.2f} s")
        if time.monotonic() - self.drawn > 30:
            self.draw()

    def held_out_loss(self, step, loss):
        self.write(step=step, val_loss=loss)
        self.held_out.append((step, loss))
        print0(f"step {step}/{self.n_steps} | held-out loss {loss:.4f}")
        self.draw()

    def draw(self):
        self.drawn = time.monotonic()
        if self.is_rank0:
            try:
                draw_curves(self.args.out / "loss.png", f"stage {self.args.stage}", self.train, self.held_out)
            except OSError as error:  # a picture is not worth a run
                print0(f"loss.png was not drawn: {one_line(error)}")


@torch.no_grad()
def evaluate(model, dataset, args, device):
    """Held-out loss: mean over all labelled tokens of the file. Every rank takes its share and as many forward passes."""
    model.eval()
    totals = [0.0, 0.0]
    order = np.argsort(-dataset.lengths, kind="stable").tolist()
    micro_batches = cut_batch(order, dist.get_rank(), dist.get_world_size(), args.micro_batch_size)
    for batch in load_ahead(dataset, micro_batches, 0):
        together(check_batches, [batch])
        totals[0] += float(model(**to_device(batch, device), reduction="sum"))
        totals[1] += count([batch])[1]
    model.reshard()  # the root keeps its parameters whole after a forward without backward
    model.train()
    ce_sum, n = sum_over_ranks(totals, device)
    return ce_sum / n


def answer_held_out(model, dataset, args, step, device):
    """Greedy answers to the first questions of some held-out rows, the same each time, into samples.jsonl. All ranks answer all and step together."""
    rows = [dataset.rows[i] for i in np.random.default_rng(0).permutation(len(dataset))[: args.samples]]
    if not rows:
        return
    model.eval()
    questions = [row["conversations"][:1] for row in rows]
    prompts = [encode_prompt(question, dataset.tokenizer, dataset.n_image_tokens, args.template) for question in questions]
    pictures = [path for row, question in zip(rows, questions) for path in row_pictures(row, args.images)[: count_images(question)]]
    pixels = together(lambda: torch.stack([preprocess_image(p, dataset.image_size, args.image_mode) for p in pictures]) if pictures else None)

    def all_ended(ended):  # a rank that stopped alone would leave the others waiting in an all-gather
        return sum_over_ranks([float(not all(ended))], device)[0] == 0

    answers = answer_ids(model, prompts, pixels, max_new_tokens=64, stop=all_ended)
    model.reshard()
    model.train()
    if dist.get_rank() == 0:
        with open(args.out / "samples.jsonl", "a", encoding="utf-8") as file:
            for row, answer in zip(rows, answers):
                question, truth = row["conversations"][0]["value"], row["conversations"][1]["value"]
                file.write(json.dumps({"step": step, "id": row.get("id"), "question": question, "answer": dataset.tokenizer.decode(answer), "truth": truth}, ensure_ascii=False) + "\n")
                print0(f"    {question.replace('<image>', '').strip()}  ->  {dataset.tokenizer.decode(answer)}  (truth: {truth})")


def write_run_json(args, n_params):
    """run.json: what was run, with what, on what."""
    def digest(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
    write_json(args.out / "run.json", {
        "command": sys.argv, "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, "commit": commit,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}, "world_size": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "parameters": n_params,
        "data": {str(path): digest(path) for path in [*args.data, *([args.val_data] if args.val_data else [])]}})


# --- 7. checkpoint and export ---------------------------------------------------------------------------------------


def save_checkpoint(args, model, optimizer, step):
    """checkpoints/step-N: what was trained, the optimiser and the step, one file a rank; written beside, then renamed."""
    path = args.out / "checkpoints" / f"step-{step}"
    partial = path.with_name(path.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    save_sharded({"model": weights, "optimizer": moments, "step": step}, checkpoint_id=partial)
    dist.barrier()
    if dist.get_rank() == 0:
        replace_folder(partial, path)
    dist.barrier()


def export(args, model, tokenizer):
    """final/: what the next stage and sample.py read. Tensors are gathered one at a time; bf16 when trained on CUDA."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    final = args.out / "final"
    if "llm" in STAGES[args.stage]["trained"]:
        return save_qilin(model, tokenizer, final, dtype, f"a language model and a projector tuned in stage {args.stage}")
    tensors = {"model." + name: full for name, full in full_tensors(model, "mm_projector.", dtype)}
    if dist.get_rank() == 0:
        partial = final.with_name("final.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_tensors(tensors, partial / "projector.safetensors")
        replace_folder(partial, final)
    dist.barrier()


# --- 8. main --------------------------------------------------------------------------------------------------------


def prepare(args):
    """Everything that can go wrong before the first step: weights' headers, tokenizer, data."""
    if not args.out.name or (args.out.exists() and not args.out.is_dir()):
        raise ValueError(f"--out {str(args.out)!r} is no folder")
    check_replaceable(args.out / "final", FINAL_FILES[args.stage])
    checkpoint = read_checkpoint(args.model, llm=args.llm, vision=args.vision, projector=args.projector, projector_type=args.projector_type)
    config = checkpoint[0]
    if args.max_length > config.text.max_position_embeddings:
        raise ValueError(f"--max-length {args.max_length} is more than the model's {config.text.max_position_embeddings} positions")
    tokenizer = Tokenizer(args.llm or args.model)
    files = [args.data] + ([[args.val_data]] if args.val_data else [])
    datasets = [Dialogs(f, tokenizer, config.n_image_tokens, config.vision.image_size, args) for f in files]
    return checkpoint, tokenizer, datasets[0], datasets[1] if args.val_data else None


def run_training(args):
    rank, world_size, device = setup_distributed()
    if together(lambda: (args.out / "final" / FINAL_FILES[args.stage]).is_file()):
        print0(f"{args.out / 'final'} is there: this run is finished (another --out, or remove the folder, to train again)")
        return dist.destroy_process_group()
    checkpoint, tokenizer, dataset, held_out = together(prepare, args)
    model, accounting = together(build_model, args, checkpoint, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=args.weight_decay, fused=True)
    batches = [b for epoch in range(args.epochs) for b in batch_order(dataset.lengths, args.batch_size, args.seed, epoch)][: args.max_steps or None]
    n_steps = len(batches)
    micro_batches = [cut_batch(batch, rank, world_size, args.micro_batch_size) for batch in batches]
    if args.workers is None:
        args.workers = min(8, max(0, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    n_params = {"all": sum(p.numel() for p in model.parameters()), "trained": sum(p.numel() for p in trained)}
    log = together(Log, args, n_steps, n_params)
    print0(f"stage {args.stage}: {n_params['trained']:,} of {n_params['all']:,} parameters trained; {accounting}")
    print0(f"{len(dataset):,} samples ({dataset.n_dropped} dropped, {dataset.n_cut} cut), median {int(np.median(dataset.lengths))} tokens; {n_steps} steps of "
           f"{args.batch_size} = {world_size} ranks x {math.ceil(args.batch_size / world_size)}, at most {args.micro_batch_size} at a time; {device.type}")

    stream = load_ahead(dataset, [micro for step in micro_batches for micro in step], args.workers)
    model.train()
    for step in range(n_steps):
        if held_out and step % args.eval_every == 0:
            log.held_out_loss(step, evaluate(model, held_out, args, device))
            answer_held_out(model, held_out, args, step, device)
        tic = time.perf_counter()
        lr = lr_at(step, n_steps, args.lr, args.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # One step is one mean over labelled tokens, however the batch is cut: they are counted over all ranks
        # and micro-batches before the first backward. FSDP averages gradients over ranks, and we want their sum.
        parts = [next(stream) for _ in micro_batches[step]]
        n_errors, n_targets, n_tokens, n_slots = sum_over_ranks(count(parts), device)
        if n_errors:
            save_checkpoint(args, model, optimizer, step)
            together(check_batches, parts)
        step_loss = 0.0
        for batch in parts:  # each backward sums its gradients over ranks: kept for the last one, they would stand whole on every rank
            loss = model(**to_device(batch, device), reduction="sum") / n_targets
            (loss * world_size).backward()
            step_loss += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm or math.inf).full_tensor()
        dist.all_reduce(step_loss)
        stop_unless_finite(step + 1, step_loss, grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.step(step + 1, step_loss.item(), lr, grad_norm.item(), time.perf_counter() - tic, n_tokens, n_slots, n_targets, device)

    export(args, model, tokenizer)
    save_checkpoint(args, model, optimizer, n_steps)
    if held_out:
        log.held_out_loss(n_steps, evaluate(model, held_out, args, device))
        answer_held_out(model, held_out, args, n_steps, device)
    log.draw()
    log.bar.close()
    print0(f"done: {args.out / 'final'}, {args.out / 'loss.png'}")
    dist.destroy_process_group()


def main():
    if os.environ.get("RANK", "0") == "0":
        return run_training(parse_args())
    try:  # what is wrong with the options rank 0 says, once
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
            args = parse_args()
    except USER_ERRORS:
        sys.exit(2)
    run_training(args)


if __name__ == "__main__":
    run_cli(main)
