"""Speed of training: train.py's own loop on a model that fills this GPU, at the paper's lengths.

What a step reaches of the peak, what it is made of, whether it waits for data or for the GPU when
it need not; the kernels that attend; one block of the true 13B, and the hours that follow from it.

    python -m gpu.speed JOB.json    one run of train.py's loop, watched; its figures to result.json
"""

import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tools.synthetic import Texts
from torch.profiler import ProfilerActivity, profile

import train
from common.files import read_json, write_json
from demo.toy import save_random_weights, tokenizer_texts, train_tokenizer
from gpu.expected import (
    MODELS,
    REACHED,
    Parts,
    StepShape,
    config_of,
    largest_model,
    peak_of,
    rates_of,
    sizes_of,
    step_flops,
    step_parts,
)
from gpu.kernels import (
    ATTENTION,
    ELEMENTWISE,
    GEMM,
    OPTIMISER,
    PARTS,
    SHARDING,
    WAITING,
    Profile,
    kernels_of,
    profile_of_kernels,
    profile_of_operators,
)
from gpu.memory import bytes_of_number, memory_of, whose_rates
from gpu.table import Context, Row
from gpu.timing import wait_for
from model_io.tokens import Tokenizer
from training.costs import flops
from training.plan import paper_answers
from training.preflight import available_memory


@dataclass(frozen=True)
class Schedule:
    """Steps of the loop, counted from 1, after which something begins; each ends the one before."""

    # one epoch: the first steps compile and ask for memory, and each length is a new one, for which
    # kernels may be chosen or made; those of later epochs are alike
    timed: int = 4
    waits: int = 12
    profiled: int = 13
    end: int = 15
    # rows of a step: what each of 8 GPUs gets of the paper's 128
    batch: int = 16


DRY = Schedule(timed=1, waits=2, profiled=3, end=4, batch=4)

# at least so much of the data sheet's peak in bf16 (issue 17)
MFU_GOALS = {"A100": 0.50, "A800": 0.50, "H100": 0.40, "H800": 0.40, "H200": 0.40}
# of a step's time, at most
WAITING_FOR_DATA = 0.02
# in a step, at most: for the loss and the gradient norm together
MEANT_WAITS = 1


# --- 1. a world to train in -----------------------------------------------------------------------


def make_world(out: Path, model: str, device: torch.device, n_rows: int) -> None:
    """out/llama, out/clip with random weights, out/images, out/data.json: rows whose questions and
    answers are as long as the paper's."""
    config = config_of(model)
    for folder in ("llama", "clip", "images"):
        (out / folder).mkdir(parents=True)
    texts = Texts(seed=0)
    train_tokenizer(out / "llama", [*tokenizer_texts(), texts.pool[:20_000]], 800)
    # 16 bits on a GPU: half of what is written and read
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with torch.device(device):
        save_random_weights(out, config.text, config.vision, seed=0)
    torch.set_default_dtype(before)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    names = draw_pictures(out / "images", n=min(64, n_rows))
    write_rows(out / "data.json", Tokenizer(out / "llama"), texts.pool, names, n_rows)


def draw_pictures(folder: Path, n: int) -> list[str]:
    """JPEGs of 800 x 600, which cost as much to decode as those of papers do."""
    rng = np.random.default_rng(0)
    names = []
    for i in range(n):
        coarse = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((800, 600), Image.Resampling.BICUBIC)
        names.append(f"{i}.jpg")
        picture.save(folder / names[-1], quality=90)
    return names


def write_rows(path: Path, tokenizer: Tokenizer, pool: str, names: list[str], n: int) -> None:
    """Questions and answers as long, in tokens of this tokenizer, as Table 2 has them."""
    rng = np.random.default_rng(0)
    tokens_a_character = len(tokenizer.encode(pool[:4000])) / 4000
    questions, answers = paper_answers(rng)

    def text(n_tokens: int) -> str:
        start = int(rng.integers(0, len(pool) - 8000))
        return pool[start : start + max(1, round(n_tokens / tokens_a_character))]

    rows = []
    for i in range(n):
        dialog = [
            {"from": "human", "value": f"<image>\n{text(questions[i])}"},
            {"from": "gpt", "value": text(answers[i])},
        ]
        rows.append({"id": str(i), "image": names[i % len(names)], "conversations": dialog})
    write_json(path, rows)


# --- 2. the loop, watched -------------------------------------------------------------------------


class Watch:
    """Sees a run of train.train() from outside: a hook at the end of each step of the optimiser,
    and one around the loader."""

    def __init__(self, device: torch.device, schedule: Schedule):
        self.device = device
        self.schedule = schedule
        # after each step: when, and how long the loop had waited for data until then
        self.times: list[float] = []
        self.waited: list[float] = []
        self.waiting_for_data = 0.0
        self.profiler: Any = None
        self.profile_seconds = 0.0

    def after_step(self, optimizer: object, args: object, named: object) -> None:
        """Of step number len(self.times), from 1."""
        self.times.append(time.perf_counter())
        self.waited.append(self.waiting_for_data)
        n = len(self.times)
        schedule = self.schedule
        if self.device.type == "cuda" and n in (schedule.waits, schedule.profiled):
            torch.cuda.set_sync_debug_mode("warn" if n == schedule.waits else "default")
        if n == schedule.profiled:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.profiler = profile(activities=activities)
            wait_for(self.device)
            self.profiler.start()
            self.profile_seconds = -time.perf_counter()
        if n == schedule.end:
            wait_for(self.device)
            self.profile_seconds += time.perf_counter()
            self.profiler.stop()

    def timing(self, load_ahead: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """train.load_ahead, timed."""

        def timed(*args: Any, **named: Any) -> Iterator[Any]:
            stream = load_ahead(*args, **named)
            while True:
                tic = time.perf_counter()
                try:
                    batch = next(stream)
                except StopIteration:
                    return
                self.waiting_for_data += time.perf_counter() - tic
                yield batch

        return timed

    def profile(self, out: Path) -> Profile:
        """Of one step, and out/profile.txt with the longest operators."""
        n = self.schedule.end - self.schedule.profiled
        averages = self.profiler.key_averages()
        is_cuda = self.device.type == "cuda"
        order = "self_device_time_total" if is_cuda else "self_cpu_time_total"
        (out / "profile.txt").write_text(averages.table(sort_by=order, row_limit=60))
        if is_cuda:
            found = profile_of_kernels(kernels_of(self.profiler.events()), self.profile_seconds)
        else:
            found = profile_of_operators(averages, self.profile_seconds)
        found.seconds /= n
        found.waiting /= n
        found.exposed /= n
        found.parts = {part: seconds / n for part, seconds in found.parts.items()}
        return found


@contextmanager
def counting_waits() -> Iterator[Counter[str]]:
    """Where the host waited for the GPU while torch was told to warn of it: {file:line: times}."""
    places: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield places
    for warning in said:
        if "synchronizing CUDA operation" in str(warning.message):
            places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


def watched_run(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """train.py's start and loop with these words, in this process."""
    settings = train.read_settings(job["words"])
    assert settings, "this is no --smoke"
    # whatever train.py would choose
    settings = replace(settings, compile=job["is_compiled"])
    schedule = Schedule(**job["schedule"])
    watch = Watch(device, schedule)
    train.load_ahead = watch.timing(train.load_ahead)
    tic = time.perf_counter()
    run = train.start(settings)
    assert run, "its folder is new"
    started = time.perf_counter() - tic
    run.optimizer.register_step_post_hook(watch.after_step)
    with counting_waits() as waits:
        train.train(run)

    first = schedule.timed
    last = schedule.waits
    seconds = watch.times[last - 1] - watch.times[first - 1]
    dataset = run.data.dataset
    batches = run.data.batches[first:last]
    work = 0.0
    for batch in batches:
        n_pictures = dataset.n_pictures[batch].sum()
        n_labels = dataset.n_labels[batch].sum()
        work += flops(run.cut.sizes, dataset.lengths[batch], n_pictures, n_labels)
    micro_batches = run.micro_batches[first]
    recomputing = []
    for part in micro_batches:
        slots = int(dataset.lengths[part].max()) * len(part)
        recomputing.append(run.cut.n_checkpointed(slots))
    first_epoch = np.diff(watch.times[:first])
    return {
        "seconds_to_start": started,
        "seconds": seconds / len(batches),
        # the second step compiles for more than one length
        "seconds_of_new_lengths": float(first_epoch[1:].mean()) if first > 2 else None,
        "flops": work / len(batches),
        "tokens": float(np.mean([dataset.lengths[batch].mean() for batch in batches])),
        "n_micro_batches": len(micro_batches),
        "n_checkpointed": max(recomputing),
        "waited_for_data": (watch.waited[last - 1] - watch.waited[first - 1]) / seconds,
        "waits": dict(waits),
        "profile": asdict(watch.profile(Path(job["out"]))),
        "n_parameters": run.cut.sizes.n_all,
    }


def main(path: Path) -> None:
    job = read_json(path)
    device = torch.device(job["device"])
    if device.type == "cpu":
        # inductor writes C++ for minutes; what is to be seen here is the way there
        torch._dynamo.config.disable = True
    result = watched_run(job, device)
    write_json(Path(job["out"]) / "result.json", result)


# --- 3. the step ----------------------------------------------------------------------------------


def speed(context: Context) -> list[Row]:
    """A step of training on this GPU, eager and with compiled blocks."""
    model = "tiny"
    if context.device.type == "cuda":
        disk = shutil.disk_usage(context.out).free
        model = model_for(memory_of(context.device), disk, available_memory())
    schedule = DRY if context.is_dry else Schedule()
    world = context.out / "world"
    make_world(world, model, context.device, n_rows=schedule.batch * schedule.timed)
    rows = []
    for way in ("eager", "compiled"):
        result = run_of(context, world, way, schedule)
        rows += rows_of_run(context, model, way, schedule.batch, result)
        context.figures[f"training {way}"] = {k: v for k, v in result.items() if k != "waits"}
    shutil.rmtree(world)
    return rows


# bytes a parameter that a run finds there before it starts: on the disk its weights, a checkpoint
# and what it exports; in the host's memory the copy that a checkpoint is written from
DISK_BYTES = 2 + 12 + 2
HOST_BYTES = 12


def model_for(gpu: float, disk: float, host: float) -> str:
    """The largest model that this machine can train alone; bytes of each kind that are there."""
    smaller = list(MODELS)[list(MODELS).index(largest_model(gpu)) :]
    for name in smaller:
        n = sizes_of(name, trains=2).n_all
        # what else lives there
        if DISK_BYTES * n < 0.9 * disk and HOST_BYTES * n < 0.8 * host:
            return name
    return smaller[-1]


def run_of(context: Context, world: Path, way: str, schedule: Schedule) -> dict[str, Any]:
    """The figures of one run, in a process of its own."""
    out = context.out / way
    out.mkdir()
    words = ["--stage", 2, "--projector", "fresh", "--lr", "1e-6"]
    words += ["--llm", world / "llama", "--vision", world / "clip"]
    words += ["--data", world / "data.json", "--images", world / "images", "--out", out / "run"]
    words += ["--batch-size", schedule.batch, "--max-steps", schedule.end, "--keep", 1]
    words += ["--epochs", schedule.end]
    job = {
        "words": list(map(str, words)),
        "out": str(out),
        "device": str(context.device),
        "schedule": asdict(schedule),
        "is_compiled": way == "compiled",
    }
    write_json(out / "job.json", job)
    subprocess.run([sys.executable, "-m", "gpu.speed", str(out / "job.json")], check=True)
    return read_json(out / "result.json")


def rows_of_run(
    context: Context, model: str, way: str, batch: int, result: dict[str, Any]
) -> list[Row]:
    """What is promised of a run, and what it is made of."""
    is_cuda = context.device.type == "cuda"
    name = f"training {model}, {way}"
    rates = rates_of(context.figures, context.is_dry)
    shape = StepShape(
        "",
        model,
        trains=2,
        rows=batch // result["n_micro_batches"],
        tokens=round(result["tokens"]),
        n_checkpointed=result["n_checkpointed"],
        n_micro_batches=result["n_micro_batches"],
    )
    e = bytes_of_number(context.device)
    expected = step_parts(shape, rates, 1, e, is_compiled=way == "compiled")
    at_most = step_flops(shape, e) / expected.total / rates.peak
    reached = result["flops"] / result["seconds"]
    mfu = reached / rates.peak
    gpu = context.figures.get("gpu_name") or ""
    goal = next((goal for kind, goal in MFU_GOALS.items() if kind in gpu), None)
    is_judged = is_cuda and goal is not None and peak_of(gpu) is not None
    rows = [
        Row(
            f"{name}: MFU",
            f"{f'at least {goal:.0%}; ' if goal else ''}"
            f"{whose_rates(context.is_dry)}: about {REACHED * at_most:.0%}, at most {at_most:.0%}",
            f"{mfu:.1%} of the data sheet, {reached / rates.gemm:.1%} of a large product; "
            f"{reached / 1e12:.4g} TFLOPS, {result['seconds']:.3f} s a step of {batch} x "
            f"{shape.tokens}, {result['n_checkpointed']} blocks recompute",
            # the best way is what is promised
            mfu >= goal if is_judged and (mfu >= goal or way == "compiled") else None,
        ),
        Row(
            f"{name}: waiting for data",
            f"under {WAITING_FOR_DATA:.0%} of a step",
            f"{result['waited_for_data']:.2%}",
            result["waited_for_data"] < WAITING_FOR_DATA if is_cuda else None,
        ),
        waits_row(name, result["waits"], is_cuda),
    ]
    if result["seconds_of_new_lengths"]:
        more = result["seconds_of_new_lengths"] - result["seconds"]
        rows.append(
            Row(
                f"{name}: lengths that were not seen before",
                "cost little: a run has some hundred of them",
                f"{more:+.3f} s a step, the step of known lengths taking {result['seconds']:.3f} s",
                None,
            )
        )
    found = Profile(**result["profile"])
    return rows + profile_rows(name, found, expected, context.is_dry)


def waits_row(name: str, waits: dict[str, int], is_cuda: bool) -> Row:
    n = sum(waits.values())
    places = ", ".join(f"{place} ({times})" for place, times in sorted(waits.items()))
    return Row(
        f"{name}: the host waits for the GPU",
        f"at most {MEANT_WAITS} a step: loss and gradient norm together",
        f"{n} a step: {places}" if is_cuda else "a CPU is never waited for",
        n <= MEANT_WAITS if is_cuda else None,
    )


def profile_rows(name: str, found: Profile, expected: Parts, is_dry: bool) -> list[Row]:
    """What a step is made of, and which kernels attend."""
    shares = {
        GEMM: expected.gemm,
        ATTENTION: expected.attention,
        ELEMENTWISE: expected.elementwise,
        SHARDING: expected.copies,
        OPTIMISER: expected.optimiser,
    }
    wanted = [f"{part} {seconds / expected.total:.1%}" for part, seconds in shares.items()]
    said = [f"{part} {found.share(part):.1%}" for part in (*PARTS, WAITING)]
    said.append(f"copied or sent while nothing computes {found.exposed / found.seconds:.1%}")
    if found.unknown:
        said.append(f"unknown: {', '.join(found.unknown[:6])}")
    parts = Row(
        f"{name}: parts of a step",
        f"{', '.join(wanted)} ({whose_rates(is_dry)})",
        ", ".join(said),
        None,
    )
    is_flash = any("flash" in kernel or "cudnn" in kernel for kernel in found.attention)
    is_seen = any(found.parts.values())
    attention = Row(
        f"{name}: flash attention is used",
        "kernels of flash attention or of cuDNN",
        ", ".join(found.attention) or "none" if is_seen else "the profiler saw no kernel here",
        is_flash if is_seen and not is_dry else None,
    )
    return [parts, attention]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
