"""Five minutes on new GPUs that prove what no test on a CPU can: `python train.py --smoke`.

NCCL and bf16, both stages with a random model of a billion parameters, a rank killed, going on,
SIGTERM, export, peak memory beside the plan's, MFU. Without CUDA the very same code runs with the
toy model on two processes, and what only a GPU proves is shown as skipped. All of it lands in
out/smoke of the current folder, one .log a script; the folder goes when nothing failed, and else at
the start of the next run. Exit code 1: a check failed.
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
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from common.files import check_replaceable, one_line, read_json, run_cli
from model_io.load import read_checkpoint
from model_io.tokens import Tokenizer, encode_conversation
from qilin_min import LOSS_CHUNK, TextConfig
from training.batches import all_batches
from training.costs import GIB, Machine, Sizes, count_sizes, step_memory
from training.plan import PAPER_TOWER, micro_batch_slots

# --- 1. what is run -------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent.parent
OUT = Path("out/smoke")
MARK = "smoke.txt"
TOY = OUT / "toy"
IS_CUDA = torch.cuda.is_available()
if IS_CUDA:
    WEIGHTS = OUT / "weights"
    RANKS = torch.cuda.device_count()
    MICRO = 8  # samples a rank holds at one time
    LIMIT = 600  # seconds until a process counts as hung
    LR = {1: 1e-3, 2: 2e-5}
else:
    WEIGHTS = TOY
    RANKS = 2
    MICRO = 4
    LIMIT = 240
    LR = {1: 1e-2, 2: 2e-3}
# two batches an epoch: first and last losses are of the same samples
BATCH = 2 * MICRO * RANKS
STEPS = {1: 8, 2: 16}
EPOCHS = {stage: steps // 2 for stage, steps in STEPS.items()}
SAVE_EVERY = 4


# --- 2. what runs by itself -----------------------------------------------------------------------
# python -m training.smoke weights | ranks

PARAMS_A_BLOCK = 50.6e6  # of write_weights' sizes


def n_blocks_to_write() -> int:
    """20 (1 billion parameters), or fewer: 16 bytes a parameter stay within half of all GPUs'
    memory, and 34 (weights, two checkpoints, two exports) within what the disk has."""
    memory = sum(torch.cuda.get_device_properties(i).total_memory for i in range(RANKS))
    disk = shutil.disk_usage(OUT).free
    for_memory = int(memory / 2 / (16 * PARAMS_A_BLOCK))
    for_disk = int(disk / (34 * PARAMS_A_BLOCK))
    return max(2, min(20, for_memory, for_disk))


def write_weights() -> None:
    """OUT/weights/llama, a LLaMA of width 2048 and up to 20 blocks, and clip, the paper's tower;
    random."""
    # The demo's code in training's: random weights that learn are made in one place, and toys are
    # the demo's. Here, since it brings what a rank does not need.
    from demo.toy import save_random_weights

    for folder in ("llama", "clip"):
        (WEIGHTS / folder).mkdir(parents=True)
    shutil.copy(TOY / "llama/tokenizer.model", WEIGHTS / "llama")
    text = TextConfig(
        vocab_size=512,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=n_blocks_to_write(),
        num_attention_heads=16,
    )
    with torch.device("cuda"):  # where a billion random numbers take no time
        save_random_weights(WEIGHTS, text, PAPER_TOWER, seed=0)


@dataclass
class RankReport:
    """What rank_check() prints: the worst of all ranks."""

    sum: float  # error of an all-reduce
    bf16: float  # relative difference of a product to float32's
    gb_per_s: float  # that the all-reduce moved


def rank_check() -> None:
    """Under torchrun: an all-reduce against its sum, a bf16 product against float32; rank 0 prints
    the worst of all ranks as JSON."""
    device = torch.device("cpu")
    backend = "gloo"
    if IS_CUDA:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    dist.init_process_group(backend)
    n = dist.get_world_size()
    x = torch.empty(2**26 if IS_CUDA else 2**20, device=device)
    seconds = time_all_reduce(x)
    sum_error = (x - n * (n + 1) / 2).abs().max()

    errors = torch.stack((sum_error, bf16_error(device)))
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        n_bytes = 2 * (n - 1) / n * x.numel() * 4
        report = RankReport(errors[0].item(), errors[1].item(), n_bytes / seconds / 1e9)
        print(json.dumps(asdict(report)), flush=True)
    dist.destroy_process_group()


def time_all_reduce(x: torch.Tensor) -> float:
    """Seconds of an all-reduce of x, which then holds the sum of all ranks' numbers, from 1."""
    seconds = 0.0
    for _ in range(4):  # the last one is timed: the first ones connect
        x.fill_(dist.get_rank() + 1.0)
        dist.barrier()
        tic = time.perf_counter()
        dist.all_reduce(x)
        x[0].item()
        seconds = time.perf_counter() - tic
    return seconds


def bf16_error(device: torch.device) -> torch.Tensor:
    """Relative difference of a bf16 product to float32's."""
    a, b = torch.randn(2, 1024, 1024, device=device)
    exact = a @ b
    rounded = (a.bfloat16() @ b.bfloat16()).float()
    return (rounded - exact).norm() / exact.norm()


# --- 3. processes ---------------------------------------------------------------------------------


class Failed(Exception):
    """A check that does not hold; its text stands in the table."""


class Skipped(Exception):
    """A check that this machine cannot make."""


def is_rank(pid: int) -> bool:
    """Whether a process is there (and no zombie) and runs one of our scripts."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        return re.search(rb"(train\.py|training\.smoke)\0", words) is not None
    return False


@dataclass
class Started:
    """A process of ours, and the file that holds what it says."""

    process: subprocess.Popen
    log: Path

    def finish(self, codes: Collection[int] = (0,)) -> str:
        """What it said, once it has ended with one of these exit codes; else Failed, with its last
        line that means something."""
        try:
            self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise Failed(f"no end after {LIMIT} s; {self.log}") from None
        finally:
            self.end()
        text = self.log.read_text(errors="replace")
        code = self.process.returncode
        if code not in codes:
            raise Failed(f"exit code {code}: {last_words(text)}; {self.log}")
        return text

    def rank_ids(self) -> list[int]:
        """Process ids of the ranks that a torchrun started, by rank."""
        pid = self.process.pid
        with suppress(OSError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [int(child) for child in children if is_rank(int(child))]
        return []

    def end(self) -> None:
        """End it and its ranks if it still runs: it is asked, then they are killed."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            for pid in self.rank_ids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Return as soon as the condition holds; Failed when the process ends before."""
        limit = time.monotonic() + LIMIT
        while not condition():
            has_ended = self.process.poll() is not None
            if has_ended or time.monotonic() > limit:
                if has_ended:
                    self.finish()
                else:
                    self.end()
                raise Failed(f"no {what} before the run ended, or {LIMIT} s; {self.log}")
            time.sleep(0.01)


def last_words(text: str) -> str:
    """The last line of a log that says what was wrong; torchrun's own report comes after it."""
    lines = [line for line in text.splitlines() if line.strip()] or ["no output"]
    error = re.compile(r"(\[rank\d+\]: ?)?(\w+\.py: |[\w.]*(Error|Exception)\b)")
    said = [line for line in lines if error.match(line)]
    return (said or lines)[-1].strip()[:200]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command_line(words: tuple[object, ...], ranks: int) -> list[str]:
    """A script of this project, or a module of it, with its options; under torchrun when ranks are
    given."""
    name = str(words[0])
    line: list[object] = [sys.executable]
    if ranks:
        line += ["-m", "torch.distributed.run", "--nproc_per_node", ranks]
        line += ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    if name.endswith(".py"):
        line += [HERE / name]
    else:
        line += ["-m", name]
    return [str(word) for word in [*line, *words[1:]]]


def logged(out: str) -> list[dict]:
    """What OUT/out/log.jsonl says of each step; a line that is being written is left out."""
    log = OUT / out / "log.jsonl"
    if not log.is_file():
        return []
    entries = [json.loads(line) for line in log.read_text().split("\n")[:-1]]
    return [entry for entry in entries if "seconds" in entry]


# --- 4. the checks: each gives its figures, or raises Failed --------------------------------------


class Checks:
    """What is run, in the order of TABLE; self.sizes comes from the first, self.report (of
    rank_check) from the second."""

    sizes: Sizes
    report: RankReport

    def __init__(self):
        self.started: list[Started] = []  # so that none outlives the smoke run

    def launch(self, name: str, *words: object, ranks: int = 0) -> Started:
        """Start a script of this project, or a module of it, under torchrun when ranks are given;
        what it says goes to OUT/name.log."""
        env = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "PYTHONPATH": str(HERE),
            # torchrun kills after 30 s, which a large checkpoint may take
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240",
        }
        path = OUT / f"{name}.log"
        with open(path, "a") as log:
            process = subprocess.Popen(
                command_line(words, ranks),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
            )
        started = Started(process, path)
        self.started.append(started)
        return started

    def train(self, stage: int, out: str, save_every: int = SAVE_EVERY) -> Started:
        """Start a stage into OUT/out. Stage 1 is cut as the plan chooses; stage 2 recomputes half
        of its blocks and adds up two micro-batches, so that both ways are run."""
        data = "alignment.json"
        projector: object = "fresh"
        cut: list[object] = []
        if stage == 2:
            data = "instruction.json"
            aligned = OUT / "stage1/final/projector.safetensors"
            if aligned.is_file():
                projector = aligned
            cut += ["--micro-batch-size", MICRO]
            cut += ["--checkpoint-layers", self.sizes.n_blocks // 2]
            cut += ["--reshard", "always"]
            cut += ["--save-every", save_every]
            cut += ["--keep", 1]
        words: list[object] = ["train.py", "--stage", stage]
        words += ["--llm", WEIGHTS / "llama"]
        words += ["--vision", WEIGHTS / "clip"]
        words += ["--images", TOY / "images"]
        words += ["--out", OUT / out]
        words += ["--data", TOY / data]
        words += ["--projector", projector]
        words += ["--batch-size", BATCH]
        words += ["--epochs", EPOCHS[stage]]
        words += ["--lr", LR[stage]]
        return self.launch(out, *words, *cut, ranks=RANKS)

    def world(self) -> str:
        """A toy world, and on CUDA weights that are no toy's."""
        words: list[object] = ["demo.toy", TOY]
        words += ["--language", 24]
        words += ["--alignment", 2 * BATCH]
        words += ["--instruction", 2 * BATCH]
        words += ["--heldout", 4]
        self.launch("toy", *words).finish()
        if IS_CUDA:
            self.launch("weights", "training.smoke", "weights").finish()
        checkpoint = read_checkpoint(
            llm=WEIGHTS / "llama", vision=WEIGHTS / "clip", projector="fresh"
        )
        trained = ("mm_projector", "llm")
        e = 2 if IS_CUDA else 4
        self.sizes = count_sizes(checkpoint.config, trained, e=e, is_fused=IS_CUDA)
        return (
            f"{self.sizes.n_all / 1e6:,.0f} M parameters, {self.sizes.n_blocks} blocks; "
            f"{2 * BATCH} samples, {BATCH} a step"
        )

    def nccl(self) -> str:
        """The sum over all ranks is right."""
        text = self.launch("ranks", "training.smoke", "ranks", ranks=RANKS).finish()
        found = re.search(r"^\{.*\}$", text, re.M)
        assert found, "rank 0 prints it"
        self.report = RankReport(**json.loads(found[0]))
        if self.report.sum:
            raise Failed(f"the sum over {RANKS} ranks is off by {self.report.sum}")
        if RANKS == 1:
            raise Skipped("one GPU: nothing crosses")
        reckoned = Machine.bandwidth / 1e9
        return (
            f"{RANKS} ranks, {self.report.gb_per_s:.0f} GB/s (the plan reckons with {reckoned:.0f})"
        )

    def bf16(self) -> str:
        """8 bits of each number: a difference of 3e-3; 0 would be no bf16."""
        figures = f"relative difference {self.report.bf16:.1e} to float32"
        if not 0 < self.report.bf16 < 1e-2:
            raise Failed(f"{figures}, not between 0 and 1e-2")
        return figures

    def stage_1(self) -> str:
        return self.whole_stage(1, "projector.safetensors")

    def stage_2(self) -> str:
        return self.whole_stage(2, "model.safetensors")

    def whole_stage(self, stage: int, file: str) -> str:
        """A stage from its first step to its export: the loss falls."""
        out = f"stage{stage}"
        self.train(stage, out).finish()
        steps = logged(out)
        final = OUT / out / "final" / file
        shutil.rmtree(OUT / out / "checkpoints")  # 12 GB on CUDA
        if len(steps) != STEPS[stage] or not final.is_file():
            state = "there" if final.is_file() else "missing"
            raise Failed(f"{len(steps)} of {STEPS[stage]} steps logged; {final} is {state}")
        first = statistics.mean(step["loss"] for step in steps[:2])
        last = statistics.mean(step["loss"] for step in steps[-2:])
        if not last < first:
            raise Failed(f"the loss does not fall: {first:.4f} -> {last:.4f} in {len(steps)} steps")
        seconds = statistics.median(step["seconds"] for step in steps)
        return f"loss {first:.4f} -> {last:.4f} in {len(steps)} steps of {seconds:.2f} s"

    def kill(self) -> str:
        """A rank killed after a checkpoint: all others end, and nothing is exported."""
        launcher = self.train(2, "killed")
        whole = OUT / f"killed/checkpoints/step-{SAVE_EVERY}/state.json"

        def is_past_checkpoint():
            return len(logged("killed")) > SAVE_EVERY + 1 and whole.is_file()

        launcher.wait_for(is_past_checkpoint, f"step {SAVE_EVERY + 2} and checkpoint")
        pids = launcher.rank_ids()
        if len(pids) != RANKS:
            launcher.end()
            raise Failed(f"{len(pids)} ranks found in /proc, not {RANKS}")
        os.kill(pids[-1], signal.SIGKILL)
        launcher.finish(codes=(1,))
        alive = [pid for pid in pids if is_rank(pid)]
        if alive or (OUT / "killed/final").exists():
            raise Failed(f"ranks went on without rank {RANKS - 1}: {alive}; {launcher.log}")
        return (
            f"rank {RANKS - 1} by SIGKILL after step {len(logged('killed'))}; "
            f"all ended, exit code {launcher.process.returncode}"
        )

    def resume(self) -> str:
        """The killed run goes on from its checkpoint, to the losses of stage 2, which was not
        killed; on a CPU to the same weights, while on CUDA sums are taken in no fixed order."""
        text = self.train(2, "killed").finish()
        said = re.search(r"going on after step (\d+)", text)
        if not said:
            raise Failed(f"it did not go on from a checkpoint; {OUT / 'killed.log'}")
        losses = [step["loss"] for step in logged("killed")]
        untouched = [step["loss"] for step in logged("stage2")]
        if len(losses) != len(untouched):
            raise Failed(
                f"{len(losses)} steps in log.jsonl, {len(untouched)} in the run that was not killed"
            )
        gap = max(abs(a - b) for a, b in zip(losses, untouched, strict=True))
        figures = f"from step {said[1]}; largest difference of a loss to stage 2's: {gap:.1e}"
        is_failed = gap > 1e-2
        if not IS_CUDA:
            weights = (OUT / "killed/final/model.safetensors").read_bytes()
            is_same = weights == (OUT / "stage2/final/model.safetensors").read_bytes()
            figures += ", weights equal byte for byte" if is_same else ", weights differ"
            is_failed = gap > 0 or not is_same
        if is_failed:
            raise Failed(figures)
        shutil.rmtree(OUT / "killed")
        return figures

    def sigterm(self) -> str:
        """SIGTERM leaves a whole checkpoint of the last step."""
        launcher = self.train(2, "stopped", save_every=1000)
        launcher.wait_for(lambda: len(logged("stopped")) >= 5, "step 5")
        launcher.process.send_signal(signal.SIGTERM)
        tic = time.monotonic()
        text = launcher.finish(codes=range(-64, 256))
        step = len(logged("stopped"))
        path = OUT / f"stopped/checkpoints/step-{step}"
        state = path / "state.json"
        is_stopped = f"stopped after step {step} " in text and state.is_file()
        if not is_stopped or read_json(state)["progress"]["step"] != step:
            raise Failed(
                f"no whole checkpoint of step {step}, the last in log.jsonl; {launcher.log}"
            )
        size = sum(file.stat().st_size for file in path.iterdir())
        shutil.rmtree(OUT / "stopped")
        seconds = time.monotonic() - tic
        return f"after step {step}; checkpoint of {size / 1e9:.2f} GB, all ended in {seconds:.1f} s"

    def export(self) -> str:
        """The exported model answers."""
        row = read_json(TOY / "heldout.json")[0]
        question = row["conversations"][0]["value"].replace("<image>", "").strip()
        words: list[object] = ["sample.py", TOY / "images" / row["image"], question]
        words += ["--model", OUT / "stage2"]
        words += ["--max-new-tokens", 16]
        text = self.launch("export", *words).finish()
        loaded = re.search(r".*model loaded .* s\b", text)
        read = re.search(r".*tokens read.*", text)
        assert loaded and read, "sample.py says both"
        return f"{loaded[0]}; {read[0]}"

    def memory(self) -> str:
        """The peak of stage 2 is the plan's, within 15 %."""
        tokenizer = Tokenizer(WEIGHTS / "llama")
        n_image_tokens = self.sizes.config.n_image_tokens
        lengths = []
        for row in read_json(TOY / "instruction.json"):
            input_ids, _ = encode_conversation(row["conversations"], tokenizer, n_image_tokens)
            lengths.append(len(input_ids))
        lengths = np.array(lengths)
        batches = all_batches(lengths, batch_size=BATCH, epochs=EPOCHS[2], seed=0, max_steps=0)
        slots = max(max(micro_batch_slots(lengths, batch, RANKS, MICRO)) for batch in batches)
        n = self.sizes.n_blocks // 2
        planned = step_memory(
            self.sizes, RANKS, slots, n, n_labels=LOSS_CHUNK, is_accumulating=True
        )
        plan = planned.peak / GIB
        peak = logged("stage2")[-1]["memory_gib"]
        of_what = "" if IS_CUDA else " of the whole process"
        figures = (
            f"{peak:.2f} GiB{of_what}, plan {plan:.2f} "
            f"({slots} tokens at a time, {n} of {self.sizes.n_blocks} blocks recomputing)"
        )
        if IS_CUDA and abs(peak / plan - 1) > 0.15:
            raise Failed(f"{figures}: {peak / plan - 1:+.0%}")
        return figures

    def mfu(self) -> str:
        """The share of the machine's peak that stage 2 reaches."""
        shares = [step["mfu"] for step in logged("stage2")[-8:]]
        if None in shares:
            raise Skipped("the peak of this machine is not known (PEAK_TFLOPS in training/plan.py)")
        share = statistics.median(shares)
        if not 0 < share < 1:
            raise Failed(f"{share:.1%} of the peak cannot be")
        return f"{share:.1%} of the bf16 peak, median of stage 2's last {len(shares)} steps"


# --- 5. the table ---------------------------------------------------------------------------------


@dataclass
class SmokeRow:
    """A row of TABLE."""

    name: str
    check: Callable[[Checks], str]
    is_cuda_only: bool = False  # whether only CUDA can prove it
    needs: tuple[str, ...] = ()  # the checks it stands on


TOY_WORLD = "toy world, random model"
ALL_REDUCE = "all-reduce under NCCL"
TABLE = (
    SmokeRow(TOY_WORLD, Checks.world),
    SmokeRow(ALL_REDUCE, Checks.nccl, is_cuda_only=True),
    SmokeRow("bf16 product", Checks.bf16, is_cuda_only=True, needs=(ALL_REDUCE,)),
    SmokeRow("stage 1", Checks.stage_1, needs=(TOY_WORLD,)),
    SmokeRow("stage 2", Checks.stage_2, needs=(TOY_WORLD,)),
    SmokeRow("kill", Checks.kill, needs=(TOY_WORLD,)),
    SmokeRow("resume", Checks.resume, needs=("stage 2", "kill")),
    SmokeRow("SIGTERM", Checks.sigterm, needs=(TOY_WORLD,)),
    SmokeRow("export", Checks.export, needs=("stage 2",)),
    SmokeRow("peak memory beside the plan's", Checks.memory, is_cuda_only=True, needs=("stage 2",)),
    SmokeRow("MFU", Checks.mfu, is_cuda_only=True, needs=("stage 2",)),
)


def run_check(checks: Checks, row: SmokeRow, results: dict[str, str]) -> tuple[str, str]:
    """(result, figures) of a row; results: of the rows before it."""
    for need in row.needs:
        if results[need] == "FAIL" or "after" in results[need]:
            return f"skipped (comes after {need})", ""
    skipped = "skipped" if IS_CUDA else "skipped (no CUDA)"
    try:
        figures = row.check(checks)
    except Skipped as error:
        return skipped, str(error)
    except Failed as error:
        return "FAIL", str(error)
    # what a check stumbles over is a finding too, and no reason to leave out the others
    except Exception as error:
        return "FAIL", f"{type(error).__name__}: {one_line(error)[:200]}"
    is_proven = IS_CUDA or not row.is_cuda_only
    return "pass" if is_proven else skipped, figures


def run_table(checks: Checks) -> tuple[dict[str, str], list[str]]:
    """All checks, a line each when it is done. ({name: result}, lines of the table)"""
    results: dict[str, str] = {}
    lines = []
    try:
        for row in TABLE:
            tic = time.monotonic()
            result, figures = run_check(checks, row, results)
            results[row.name] = result
            lines.append(f"| {row.name} | {result} | {figures} |")
            print(f"{lines[-1]}  {time.monotonic() - tic:.1f} s", flush=True)
    finally:
        for started in checks.started:
            started.end()
    return results, lines


def stop_at_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    """Leave in an orderly way, so that what was started is ended."""
    sys.exit(143)


def run_smoke() -> None:
    """All checks, then their table; ends the process with exit code 1 if one failed."""
    check_replaceable(OUT, MARK)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    (OUT / MARK).write_text("of train.py --smoke, which replaces this folder\n")
    device = "a CPU, tiny model"
    if IS_CUDA:
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        device = f"{torch.cuda.get_device_name()}, {memory:.0f} GiB"
    print(
        f"smoke: {RANKS} processes on {device}; torch {torch.__version__}; logs in {OUT}",
        flush=True,
    )
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, stop_at_sigterm)
    results, lines = run_table(Checks())

    n_passed = sum(result.startswith("pass") for result in results.values())
    n_failed = sum(result.startswith("FAIL") for result in results.values())
    n_skipped = sum(result.startswith("skipped") for result in results.values())
    print("", "| check | result | figures |", "|---|---|---|", *lines, "", sep="\n")
    summary = f"smoke: {n_passed} passed, {n_failed} failed, {n_skipped} skipped"
    summary += f", {time.monotonic() - begin:.0f} seconds"
    if n_failed:
        summary += f"; what is in {OUT} is kept"
    print(summary, flush=True)
    if n_failed:
        sys.exit(1)
    shutil.rmtree(OUT)


if __name__ == "__main__":
    run_cli({"ranks": rank_check, "weights": write_weights}[sys.argv[1]])
