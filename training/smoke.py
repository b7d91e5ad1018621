"""Five minutes on new GPUs that prove what no test on a CPU can: `python train.py --smoke`.

NCCL and bf16, both stages with a random model of a billion parameters, a rank killed, going on, SIGTERM, export, peak memory beside the plan's, MFU.
Without CUDA the very same code runs with the toy model on two processes, and what only a GPU proves is shown as skipped. All of it lands in out/smoke
of the current folder, one .log a script; the folder goes when nothing failed, and else at the start of the next run. Exit code 1: a check failed.
"""

import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common.files import check_replaceable, one_line, read_json, run_cli
from model_io.load import read_checkpoint
from model_io.tokens import Tokenizer, encode_conversation
from qilin_min import LOSS_CHUNK, TextConfig
from training.batches import all_batches
from training.costs import GIB, Machine, count_sizes, step_memory
from training.plan import PAPER_TOWER, micro_batch_slots

# --- 1. what is run -------------------------------------------------------------------------------------------------

HERE, OUT, MARK, IS_CUDA = (
    Path(__file__).resolve().parent.parent,
    Path("out/smoke"),
    "smoke.txt",
    torch.cuda.is_available(),
)
TOY, WEIGHTS = OUT / "toy", OUT / ("weights" if IS_CUDA else "toy")
RANKS = torch.cuda.device_count() if IS_CUDA else 2
MICRO, LIMIT = (
    (8, 600) if IS_CUDA else (4, 240)
)  # samples a rank holds at one time; seconds until a process counts as hung
BATCH, STEPS, SAVE_EVERY = (
    2 * MICRO * RANKS,
    {1: 8, 2: 16},
    4,
)  # two batches an epoch: first and last losses are of the same samples
LR = {1: 1e-3, 2: 2e-5} if IS_CUDA else {1: 1e-2, 2: 2e-3}
PARAMS_A_BLOCK = 50.6e6  # of write_weights' sizes


def write_weights():
    """`python -m training.smoke weights`: OUT/weights/llama, a LLaMA of width 2048 and up to 20 blocks (1 billion parameters), and clip, the paper's tower; random.

    Fewer blocks where 16 bytes a parameter are more than half of all GPUs' memory, or 34 (weights, two checkpoints, two exports) more than the disk has.
    """
    from demo.toy import save_random_weights  # here, since it brings what a rank does not need

    total = sum(torch.cuda.get_device_properties(i).total_memory for i in range(RANKS))
    n_layers = max(
        2,
        min(
            20,
            int(total / 2 / (16 * PARAMS_A_BLOCK)),
            int(shutil.disk_usage(OUT).free / (34 * PARAMS_A_BLOCK)),
        ),
    )
    for folder in ("llama", "clip"):
        (WEIGHTS / folder).mkdir(parents=True)
    shutil.copy(TOY / "llama/tokenizer.model", WEIGHTS / "llama")
    text = TextConfig(
        vocab_size=512,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=n_layers,
        num_attention_heads=16,
    )
    with torch.device("cuda"):  # where a billion random numbers take no time
        save_random_weights(WEIGHTS, text, PAPER_TOWER, seed=0)


def rank_check():
    """`python -m training.smoke ranks`, under torchrun: an all-reduce against its sum, a bf16 product against float32; rank 0 prints the worst of all ranks as JSON."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if IS_CUDA else torch.device("cpu")
    if IS_CUDA:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if IS_CUDA else "gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    x = torch.empty(2**26 if IS_CUDA else 2**20, device=device)
    for _ in range(4):  # the last one is timed: the first ones connect
        x.fill_(rank + 1.0)
        dist.barrier()
        tic = time.perf_counter()
        dist.all_reduce(x)
        x[0].item()
        seconds = time.perf_counter() - tic
    a, b = torch.randn(2, 1024, 1024, device=device)
    exact = a @ b
    errors = torch.stack(
        (
            (x - n * (n + 1) / 2).abs().max(),
            ((a.bfloat16() @ b.bfloat16()).float() - exact).norm() / exact.norm(),
        )
    )
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    if rank == 0:
        print(
            json.dumps(
                {
                    "sum": errors[0].item(),
                    "bf16": errors[1].item(),
                    "gb_per_s": 2 * (n - 1) / n * x.numel() * 4 / seconds / 1e9,
                }
            ),
            flush=True,
        )
    dist.destroy_process_group()


# --- 2. processes ---------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A check that does not hold; its text stands in the table."""


class Skipped(Exception):
    """A check that this machine cannot make."""


STARTED = []  # every process, so that none outlives the smoke run


def launch(name, *words, ranks=0):
    """Start a script of this project, or a module of it, under torchrun when ranks are given; what it says goes to OUT/name.log."""
    torchrun = []
    if ranks:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            torchrun = [
                "-m",
                "torch.distributed.run",
                "--nproc_per_node",
                ranks,
                "--master_addr",
                "127.0.0.1",
                "--master_port",
                s.getsockname()[1],
            ]
    script = [HERE / words[0]] if words[0].endswith(".py") else ["-m", words[0]]
    env = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": str(HERE),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240",
    }  # torchrun kills after 30 s, which a large checkpoint may take
    with open(OUT / f"{name}.log", "a") as log:
        process = subprocess.Popen(
            list(map(str, [sys.executable, *torchrun, *script, *words[1:]])),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
        )
    process.log = OUT / f"{name}.log"
    STARTED.append(process)
    return process


def finish(process, codes=(0,)):
    """What a process said, once it has ended with one of these exit codes; else Failed, with its last line that means something."""
    try:
        process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        raise Failed(f"no end after {LIMIT} s; {process.log}") from None
    finally:
        end(process)
    text = process.log.read_text(errors="replace")
    if process.returncode not in codes:
        lines = [line for line in text.splitlines() if line.strip()] or ["no output"]
        said = [
            line
            for line in lines
            if re.match(r"(\[rank\d+\]: ?)?(\w+\.py: |[\w.]*(Error|Exception)\b)", line)
        ]  # torchrun's own report comes after it
        raise Failed(
            f"exit code {process.returncode}: {(said or lines)[-1].strip()[:200]}; {process.log}"
        )
    return text


def is_rank(pid):
    """Whether a process is there (and no zombie) and runs one of our scripts."""
    with suppress(OSError):
        return bool(
            re.search(rb"(train\.py|training\.smoke)\0", Path(f"/proc/{pid}/cmdline").read_bytes())
        )


def ranks_of(launcher):
    """Process ids of the ranks that a torchrun started, by rank."""
    with suppress(OSError):
        return [
            int(pid)
            for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
            .read_text()
            .split()
            if is_rank(pid)
        ]
    return []


def end(process):
    """End a process that still runs, and its ranks: it is asked, then they are killed."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            for pid in ranks_of(process):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait()


def logged(out):
    """What OUT/out/log.jsonl says of each step; a line that is being written is left out."""
    log = OUT / out / "log.jsonl"
    return [
        entry
        for entry in map(json.loads, log.read_text().split("\n")[:-1] if log.is_file() else ())
        if "seconds" in entry
    ]


def wait_for(process, condition, what):
    """Return as soon as the condition holds; Failed when the process ends before."""
    limit = time.monotonic() + LIMIT
    while not condition():
        if process.poll() is not None or time.monotonic() > limit:
            finish(process) if process.poll() is not None else end(process)
            raise Failed(f"no {what} before the run ended, or {LIMIT} s; {process.log}")
        time.sleep(0.01)


# --- 3. the checks: each gives its figures, or raises Failed --------------------------------------------------------


class Checks:
    """What is run, in the order of TABLE; self.sizes comes from the first, self.found (of rank_check) from the second."""

    def world(self):
        finish(
            launch(
                "toy",
                "demo.toy",
                TOY,
                "--language",
                24,
                "--alignment",
                2 * BATCH,
                "--instruction",
                2 * BATCH,
                "--heldout",
                4,
            )
        )
        if IS_CUDA:
            finish(launch("weights", "training.smoke", "weights"))
        self.sizes = count_sizes(
            read_checkpoint(
                llm=WEIGHTS / "llama", vision=WEIGHTS / "clip", projector="fresh"
            ).config,
            ("mm_projector", "llm"),
            e=2 if IS_CUDA else 4,
        )
        return f"{self.sizes.n_all / 1e6:,.0f} M parameters, {self.sizes.n_blocks} blocks; {2 * BATCH} samples, {BATCH} a step"

    def train(self, stage, out, save_every=SAVE_EVERY):
        """Start a stage into OUT/out. Stage 1 is cut as the plan chooses; stage 2 recomputes half of its blocks and adds up two micro-batches, so that both ways are run."""
        projector = OUT / "stage1/final/projector.safetensors"
        cut = [
            "--micro-batch-size",
            MICRO,
            "--checkpoint-layers",
            self.sizes.n_blocks // 2,
            "--reshard",
            "always",
            "--save-every",
            save_every,
            "--keep",
            1,
        ]
        return launch(
            out,
            "train.py",
            "--stage",
            stage,
            "--llm",
            WEIGHTS / "llama",
            "--vision",
            WEIGHTS / "clip",
            "--images",
            TOY / "images",
            "--out",
            OUT / out,
            "--data",
            TOY / ("alignment.json" if stage == 1 else "instruction.json"),
            "--projector",
            projector if stage == 2 and projector.is_file() else "fresh",
            "--batch-size",
            BATCH,
            "--epochs",
            STEPS[stage] // 2,
            "--lr",
            LR[stage],
            *(cut if stage == 2 else ()),
            ranks=RANKS,
        )

    def nccl(self):
        self.found = json.loads(
            re.search(
                r"^\{.*\}$", finish(launch("ranks", "training.smoke", "ranks", ranks=RANKS)), re.M
            )[0]
        )
        if self.found["sum"]:
            raise Failed(f"the sum over {RANKS} ranks is off by {self.found['sum']}")
        if RANKS == 1:
            raise Skipped("one GPU: nothing crosses")
        return f"{RANKS} ranks, {self.found['gb_per_s']:.0f} GB/s (the plan reckons with {Machine.bandwidth / 1e9:.0f})"

    def bf16(self):
        if not 0 < self.found["bf16"] < 1e-2:  # 8 bits of each number: 3e-3; 0 would be no bf16
            raise Failed(
                f"relative difference {self.found['bf16']:.1e} to float32, not between 0 and 1e-2"
            )
        return f"relative difference {self.found['bf16']:.1e} to float32"

    def stage(self, stage, file):
        finish(self.train(stage, f"stage{stage}"))
        steps, final = logged(f"stage{stage}"), OUT / f"stage{stage}/final" / file
        shutil.rmtree(OUT / f"stage{stage}/checkpoints")  # 12 GB on CUDA
        if len(steps) != STEPS[stage] or not final.is_file():
            raise Failed(
                f"{len(steps)} of {STEPS[stage]} steps logged; {final} is {'there' if final.is_file() else 'missing'}"
            )
        first, last = (
            statistics.mean(step["loss"] for step in part) for part in (steps[:2], steps[-2:])
        )
        if not last < first:
            raise Failed(f"the loss does not fall: {first:.4f} -> {last:.4f} in {len(steps)} steps")
        return f"loss {first:.4f} -> {last:.4f} in {len(steps)} steps of {statistics.median(step['seconds'] for step in steps):.2f} s"

    def kill(self):
        launcher, whole = (
            self.train(2, "killed"),
            OUT / f"killed/checkpoints/step-{SAVE_EVERY}/state.json",
        )
        wait_for(
            launcher,
            lambda: len(logged("killed")) > SAVE_EVERY + 1 and whole.is_file(),
            f"step {SAVE_EVERY + 2} and checkpoint",
        )
        pids = ranks_of(launcher)
        if len(pids) != RANKS:
            end(launcher)
            raise Failed(f"{len(pids)} ranks found in /proc, not {RANKS}")
        os.kill(pids[-1], signal.SIGKILL)
        finish(launcher, codes=(1,))
        if any(map(is_rank, pids)) or (OUT / "killed/final").exists():
            raise Failed(
                f"ranks went on without rank {RANKS - 1}: {[pid for pid in pids if is_rank(pid)]}; {launcher.log}"
            )
        return f"rank {RANKS - 1} by SIGKILL after step {len(logged('killed'))}; all ended, exit code {launcher.returncode}"

    def resume(self):
        said = re.search(r"going on after step (\d+)", finish(self.train(2, "killed")))
        if not said:
            raise Failed(f"it did not go on from a checkpoint; {OUT / 'killed.log'}")
        losses, untouched = ([step["loss"] for step in logged(out)] for out in ("killed", "stage2"))
        if len(losses) != len(untouched):
            raise Failed(
                f"{len(losses)} steps in log.jsonl, {len(untouched)} in the run that was not killed"
            )
        gap = max(abs(a - b) for a, b in zip(losses, untouched))
        figures = f"from step {said[1]}; largest difference of a loss to stage 2's: {gap:.1e}"
        if not IS_CUDA:  # where sums are taken in no fixed order
            is_same = (OUT / "killed/final/model.safetensors").read_bytes() == (
                OUT / "stage2/final/model.safetensors"
            ).read_bytes()
            figures += ", weights equal byte for byte" if is_same else ", weights differ"
        if gap > 1e-2 or not IS_CUDA and (gap > 0 or not is_same):
            raise Failed(figures)
        shutil.rmtree(OUT / "killed")
        return figures

    def sigterm(self):
        launcher = self.train(2, "stopped", save_every=1000)
        wait_for(launcher, lambda: len(logged("stopped")) >= 5, "step 5")
        launcher.send_signal(signal.SIGTERM)
        tic, text, step = (
            time.monotonic(),
            finish(launcher, codes=range(-64, 256)),
            len(logged("stopped")),
        )
        path = OUT / f"stopped/checkpoints/step-{step}"
        if (
            f"stopped after step {step} " not in text
            or not (path / "state.json").is_file()
            or read_json(path / "state.json")["progress"]["step"] != step
        ):
            raise Failed(
                f"no whole checkpoint of step {step}, the last in log.jsonl; {launcher.log}"
            )
        size = sum(file.stat().st_size for file in path.iterdir())
        shutil.rmtree(OUT / "stopped")
        return f"after step {step}; checkpoint of {size / 1e9:.2f} GB, all ended in {time.monotonic() - tic:.1f} s"

    def export(self):
        row = read_json(TOY / "heldout.json")[0]
        question = row["conversations"][0]["value"].replace("<image>", "").strip()
        text = finish(
            launch(
                "export",
                "sample.py",
                TOY / "images" / row["image"],
                question,
                "--model",
                OUT / "stage2",
                "--max-new-tokens",
                16,
            )
        )
        return (
            re.search(r".*model loaded .* s\b", text)[0]
            + "; "
            + re.search(r".*tokens read.*", text)[0]
        )

    def memory(self):
        tokenizer, n_image_tokens, n = (
            Tokenizer(WEIGHTS / "llama"),
            self.sizes.config.n_image_tokens,
            self.sizes.n_blocks // 2,
        )
        lengths = np.array(
            [
                len(encode_conversation(row["conversations"], tokenizer, n_image_tokens)[0])
                for row in read_json(TOY / "instruction.json")
            ]
        )
        batches = all_batches(lengths, batch_size=BATCH, epochs=STEPS[2] // 2, seed=0, max_steps=0)
        slots = max(max(micro_batch_slots(lengths, batch, RANKS, MICRO)) for batch in batches)
        plan = (
            step_memory(self.sizes, RANKS, slots, n, n_labels=LOSS_CHUNK, is_accumulating=True).peak
            / GIB
        )
        peak = logged("stage2")[-1]["memory_gib"]
        figures = f"{peak:.2f} GiB{'' if IS_CUDA else ' of the whole process'}, plan {plan:.2f} ({slots} tokens at a time, {n} of {self.sizes.n_blocks} blocks recomputing)"
        if IS_CUDA and abs(peak / plan - 1) > 0.15:
            raise Failed(f"{figures}: {peak / plan - 1:+.0%}")
        return figures

    def mfu(self):
        shares = [step["mfu"] for step in logged("stage2")[-8:]]
        if None in shares:
            raise Skipped("the peak of this machine is not known (PEAK_TFLOPS in train.py)")
        if not 0 < statistics.median(shares) < 1:
            raise Failed(f"{statistics.median(shares):.1%} of the peak cannot be")
        return f"{statistics.median(shares):.1%} of the bf16 peak, median of stage 2's last {len(shares)} steps"


# --- 4. the table ---------------------------------------------------------------------------------------------------

TABLE = {  # name: (method and arguments, whether only CUDA can prove it, the checks it stands on)
    "toy world, random model": (("world",), False, ()),
    "all-reduce under NCCL": (("nccl",), True, ()),
    "bf16 product": (("bf16",), True, ("all-reduce under NCCL",)),
    "stage 1": (("stage", 1, "projector.safetensors"), False, ("toy world, random model",)),
    "stage 2": (("stage", 2, "model.safetensors"), False, ("toy world, random model",)),
    "kill": (("kill",), False, ("toy world, random model",)),
    "resume": (("resume",), False, ("stage 2", "kill")),
    "SIGTERM": (("sigterm",), False, ("toy world, random model",)),
    "export": (("export",), False, ("stage 2",)),
    "peak memory beside the plan's": (("memory",), True, ("stage 2",)),
    "MFU": (("mfu",), True, ("stage 2",)),
}


def run_check(checks, results, method, is_cuda_only, needs):
    """(result, figures) of a row."""
    if lacking := [need for need in needs if results[need] == "FAIL" or "after" in results[need]]:
        return f"skipped (comes after {lacking[0]})", ""
    try:
        figures = getattr(checks, method[0])(*method[1:])
        return "skipped (no CUDA)" if is_cuda_only and not IS_CUDA else "pass", figures
    except Skipped as error:
        return "skipped" if IS_CUDA else "skipped (no CUDA)", str(error)
    except Failed as error:
        return "FAIL", str(error)
    except Exception as error:  # what a check stumbles over is a finding too, and no reason to leave out the others
        return "FAIL", f"{type(error).__name__}: {one_line(error)[:200]}"


def run_smoke():
    """All checks, a line each when it is done, then the table; ends the process with exit code 1 if one failed."""
    check_replaceable(OUT, MARK)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    (OUT / MARK).write_text("of train.py --smoke, which replaces this folder\n")
    device = (
        f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / GIB:.0f} GiB"
        if IS_CUDA
        else "a CPU, tiny model"
    )
    print(
        f"smoke: {RANKS} processes on {device}; torch {torch.__version__}; logs in {OUT}",
        flush=True,
    )
    checks, results, lines, begin = Checks(), {}, [], time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    try:
        for name, row in TABLE.items():
            tic = time.monotonic()
            results[name], figures = run_check(checks, results, *row)
            lines.append(f"| {name} | {results[name]} | {figures} |")
            print(f"{lines[-1]}  {time.monotonic() - tic:.1f} s", flush=True)
    finally:
        for process in STARTED:
            end(process)
    n = {
        word: sum(result.startswith(word) for result in results.values())
        for word in ("pass", "FAIL", "skipped")
    }
    print("", "| check | result | figures |", "|---|---|---|", *lines, "", sep="\n")
    print(
        f"smoke: {n['pass']} passed, {n['FAIL']} failed, {n['skipped']} skipped, {time.monotonic() - begin:.0f} seconds"
        + f"; what is in {OUT} is kept" * bool(n["FAIL"]),
        flush=True,
    )
    if n["FAIL"]:
        sys.exit(1)
    shutil.rmtree(OUT)


if __name__ == "__main__":
    run_cli(rank_check if sys.argv[1:] == ["ranks"] else write_weights)
