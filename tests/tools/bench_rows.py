"""The rows of bench.py's table: our work and a peer's, side by side, in turn, equal results first.

Each row is a function of `runs` that yields Measured. Times are ratios of pairs: what else runs on
the machine slows both.
"""

import ctypes
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import train
from model_io.beginnings import Beginnings
from model_io.devices import default_dtype
from model_io.export import save_qilin
from model_io.gguf import save_gguf
from model_io.load import load_qilin
from model_io.pixels import PAD_COLOR, preprocess_image
from model_io.tokens import Tokenizer
from qilin_min import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    KVCache,
    Qilin,
    QilinConfig,
    TextConfig,
    VisionConfig,
    count_image_positions,
    count_labels,
    generate,
)
from training.ranks import setup_distributed

ROOT = Path(__file__).resolve().parent.parent.parent

# --- 1. what is measured --------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A line of the table. ratio: ours over the peer's, of times where is_time, else of rates."""

    work: str
    peer: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    goal: float
    is_time: bool
    memory_ours: float | None = None
    memory_peer: float | None = None
    memory_goal: float | None = None

    @property
    def is_met(self) -> bool:
        is_fast = self.ratio <= self.goal if self.is_time else self.ratio >= self.goal
        if self.memory_goal is None or not self.memory_peer or self.memory_ours is None:
            return is_fast
        return is_fast and self.memory_ours <= self.memory_goal * self.memory_peer


def in_turn(works: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """What each of the works gave in `runs` rounds; a round before does not count, and every second
    one goes backwards."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for run in range(runs + 1):
        names = list(works)
        if run % 2 == 0:
            names.reverse()
        for name in names:
            value = works[name]()
            if run > 0:
                found[name].append(value)
    return found


def ratio_of(ours: list[float], theirs: list[float]) -> float:
    """The median of pairs measured one after the other."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def resident() -> dict[str, int]:
    """Bytes of this process in memory now, and at most since forget_peak()."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            found[name] = int(value.split()[0]) * 1024
    return found


def extra_memory(call: Callable[[], Any]) -> float:
    """MiB that a call takes at its peak beyond what is held before it."""
    gc.collect()
    # what earlier calls have freed goes back to the system first, or it would count as held
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()["VmRSS"]
    call()
    return (resident()["VmHWM"] - before) / 2**20


# --- 2. models ------------------------------------------------------------------------------------

N_PICTURE = 576
VISION = VisionConfig(256, 1024, 6, 4, image_size=336, patch_size=14)
BENCH = TextConfig(32064, 512, 1376, 8, 8, max_position_embeddings=2048)
HALF = TextConfig(32064, 1280, 3456, 20, 20, max_position_embeddings=2048)
# four decoder blocks of 13B's true size, a small vocabulary
BLOCKS = TextConfig(32064, 5120, 13824, 4, 40, max_position_embeddings=2048)
SMALL_TOWER = VisionConfig(64, 128, 2, 2, image_size=56, patch_size=14)


def random_model(text: TextConfig, vision: VisionConfig = VISION) -> Qilin:
    torch.manual_seed(0)
    model = Qilin(QilinConfig(text, vision, projector_type="mlp2x_gelu", n_token_ids=32000))
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                # as trained ones are: logits stay near each other
                param.normal_(0, 0.02)
    return model.eval()


def real_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer of 32000 pieces, which tests/run.sh installs."""
    import mistral_common

    (source,) = Path(mistral_common.__file__).parent.rglob("tokenizer.model.v1")
    (folder / "tokenizer.model").write_bytes(source.read_bytes())
    return Tokenizer(folder)


def their_llava(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def their_ids(ids: torch.Tensor, llava: Any) -> torch.Tensor:
    return ids.masked_fill(ids == IMAGE_TOKEN_INDEX, llava.config.image_token_id)


# --- 3. training ----------------------------------------------------------------------------------

STEP_GOALS = {
    # stage -> against transformers in float32: in float32, in bfloat16; and bfloat16's own autocast
    2: (0.60, 0.42, 0.8),
    1: (0.61, 0.44, 0.8),
}


def a_batch() -> dict[str, torch.Tensor]:
    """Four samples of a picture and 128 tokens, the last 64 of which are labelled."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 32000, (4, N_PICTURE + 128), generator=generator)
    ids[:, 5 : 5 + N_PICTURE] = IMAGE_TOKEN_INDEX
    labels = ids.clone()
    labels[:, :-64] = IGNORE_INDEX
    pixels = torch.randn(4, 3, 336, 336, generator=generator)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def our_step(folder: Path, stage: int, dtype: torch.dtype) -> Callable[[], float]:
    """train.py's step on one rank: forward, backward, clipping, AdamW. -> the loss."""
    if not torch.distributed.is_initialized():
        setup_distributed()
    model = load_qilin(folder)
    trained_parts = train.STAGES[stage].trained
    model = train.shard_model(model, torch.device("cpu"), trained_parts, dtype).train()
    optimizer = train.build_optimizer(model, lr=1e-5, weight_decay=0.0)
    trained = [param for param in model.parameters() if param.requires_grad]
    run: Any = SimpleNamespace(
        model=model,
        device=torch.device("cpu"),
        cut=SimpleNamespace(n_checkpointed=lambda slots: 0),
    )
    batch = a_batch()
    n_labels = count_labels(batch["labels"])
    n_image_positions = count_image_positions(batch["input_ids"])
    part = {**batch, "n_labels": n_labels, "n_image_positions": n_image_positions}

    def step() -> float:
        loss = train.backward(run, [part], n_labels)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def their_step(folder: Path, stage: int, autocast: bool) -> Callable[[], float]:
    llava = their_llava(folder, torch.float32).train()
    parts = ["multi_modal_projector"]
    if stage == 2:
        parts += ["language", "lm_head"]
    for name, param in llava.named_parameters():
        param.requires_grad_(any(part in name for part in parts))
    trained = [param for param in llava.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    batch = a_batch()
    batch["input_ids"] = their_ids(batch["input_ids"], llava)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = llava(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def steps(runs: int, stage: int) -> Iterator[Measured]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_qilin(random_model(BENCH), None, folder)
        works = {
            "ours": our_step(folder, stage, torch.float32),
            "ours bf16": our_step(folder, stage, torch.bfloat16),
            "theirs": their_step(folder, stage, autocast=False),
            "theirs bf16": their_step(folder, stage, autocast=True),
        }
    losses = {name: work() for name, work in works.items()}
    assert abs(losses["ours"] - losses["theirs"]) < 1e-3, losses
    assert abs(losses["ours bf16"] - losses["theirs"]) < 5e-2, losses
    memory = {name: extra_memory(work) for name, work in works.items()}
    timed = {name: lambda work=work: seconds_of(work) for name, work in works.items()}
    found = in_turn(timed, runs)
    goals = STEP_GOALS[stage]
    work = f"stage {stage} training step, 4 x (576 + 128) tokens"
    pairs = (
        ("ours", "theirs", "float32", "transformers float32", goals[0]),
        ("ours bf16", "theirs", "bfloat16", "transformers float32", goals[1]),
        ("ours bf16", "theirs bf16", "bfloat16", "transformers bfloat16 autocast", goals[2]),
    )
    for ours, theirs, dtype, peer, goal in pairs:
        yield Measured(
            f"{work}, {dtype}",
            peer,
            "s",
            statistics.median(found[ours]),
            statistics.median(found[theirs]),
            ratio_of(found[ours], found[theirs]),
            goal,
            is_time=True,
            memory_ours=memory[ours],
            memory_peer=memory[theirs],
            memory_goal=0.6 if ours == "ours" else None,
        )


def stage2(runs: int) -> Iterator[Measured]:
    yield from steps(runs, 2)


def stage1(runs: int) -> Iterator[Measured]:
    yield from steps(runs, 1)


# --- 4. asking, beside transformers ---------------------------------------------------------------

N_NEW = 32
PROMPT = [1, *range(100, 132), *[IMAGE_TOKEN_INDEX] * N_PICTURE, *range(200, 231)]


def our_rate(model: Qilin, pixels: torch.Tensor, n_rows: int) -> float:
    """Tokens a second after the first."""
    ticks = []
    prompts = [PROMPT] * n_rows
    some = pixels.expand(n_rows, -1, -1, -1)
    answers = generate(model, prompts, some, max_new_tokens=N_NEW, stop=lambda ended: False)
    for _ in answers:
        ticks.append(time.perf_counter())
    return n_rows * (len(ticks) - 1) / (ticks[-1] - ticks[0])


class Ticks(list):
    """A streamer that notes when each token came."""

    def put(self, value: Any) -> None:
        self.append(time.perf_counter())

    def end(self) -> None:
        pass


class Clock:
    """A stopping criterion that notes when each token came, for more rows than one."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.ticks.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


def their_rate(llava: Any, pixels: torch.Tensor, n_rows: int, cache: str | None) -> float:
    clock = Clock()
    llava.generate(
        input_ids=their_ids(torch.tensor([PROMPT] * n_rows), llava),
        pixel_values=pixels.expand(n_rows, -1, -1, -1).to(llava.dtype),
        max_new_tokens=N_NEW,
        min_new_tokens=N_NEW,
        do_sample=False,
        cache_implementation=cache,
        stopping_criteria=[clock],
    )
    return n_rows * (len(clock.ticks) - 1) / (clock.ticks[-1] - clock.ticks[0])


def asking_models(folder: Path) -> tuple[dict[str, Qilin], dict[str, Any]]:
    save_qilin(random_model(BENCH), None, folder)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    ours = {name: load_qilin(folder, dtype=dtype) for name, dtype in dtypes.items()}
    theirs = {name: their_llava(folder, dtype).eval() for name, dtype in dtypes.items()}
    return ours, theirs


@torch.no_grad()
def first_logits(model: Qilin, pixels: torch.Tensor) -> torch.Tensor:
    cache = KVCache(model.config.text.num_hidden_layers, len(PROMPT))
    ids = torch.tensor([PROMPT])
    return model(ids, pixels, cache=cache, lengths=torch.tensor([len(PROMPT)]))


@torch.no_grad()
def their_first_logits(llava: Any, pixels: torch.Tensor) -> torch.Tensor:
    done = llava(
        input_ids=their_ids(torch.tensor([PROMPT]), llava),
        pixel_values=pixels.to(llava.dtype),
        use_cache=True,
        logits_to_keep=1,
    )
    return done.logits[:, -1].float()


def prefill(runs: int) -> Iterator[Measured]:
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = asking_models(Path(name) / "model")
    off = first_logits(ours["float32"], pixels)[:, :32000]
    off = off - their_first_logits(theirs["float32"], pixels)[:, :32000]
    assert off.abs().max() < 1e-4, "the models differ"
    works: dict[str, Callable[[], float]] = {}
    for dtype in ours:
        works[f"ours {dtype}"] = lambda d=dtype: seconds_of(lambda: first_logits(ours[d], pixels))
        works[f"theirs {dtype}"] = lambda d=dtype: seconds_of(
            lambda: their_first_logits(theirs[d], pixels)
        )
    found = in_turn(works, runs)
    best = min(ours, key=lambda dtype: statistics.median(found[f"ours {dtype}"]))
    for dtype, goal in (("float32", 0.6), ("bfloat16", 0.95)):
        mine, other = found[f"ours {best}"], found[f"theirs {dtype}"]
        yield Measured(
            f"prefill, a picture and 64 tokens, {best}",
            f"transformers {dtype}",
            "s",
            statistics.median(mine),
            statistics.median(other),
            ratio_of(mine, other),
            goal,
            is_time=True,
        )


def decode(runs: int) -> Iterator[Measured]:
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = asking_models(Path(name) / "model")
    works: dict[str, Callable[[], float]] = {}
    for dtype in ours:
        works[f"ours {dtype}"] = lambda d=dtype: our_rate(ours[d], pixels, 1)
        for cache in (None, "static"):
            works[f"theirs {dtype} {cache}"] = lambda d=dtype, c=cache: their_rate(
                theirs[d], pixels, 1, c
            )
    found = in_turn(works, runs)

    def median(name: str) -> float:
        return statistics.median(found[name])

    best = max(ours, key=lambda dtype: median(f"ours {dtype}"))
    for dtype, goal in (("float32", 2.2), ("bfloat16", 1.8)):
        other = max((f"theirs {dtype} {cache}" for cache in (None, "static")), key=median)
        yield Measured(
            f"decode, bench model, {best}",
            f"transformers {dtype}, {'static' if 'static' in other else 'dynamic'} cache",
            "tokens/s",
            median(f"ours {best}"),
            median(other),
            ratio_of(found[f"ours {best}"], found[other]),
            goal,
            is_time=False,
        )


def decode8(runs: int) -> Iterator[Measured]:
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = asking_models(Path(name) / "model")
    works = {
        "ours 8": lambda: our_rate(ours["float32"], pixels, 8),
        "ours 1": lambda: our_rate(ours["float32"], pixels, 1),
        "theirs 8": lambda: their_rate(theirs["float32"], pixels, 8, None),
    }
    found = in_turn(works, runs)
    for peer, other, goal in (
        ("ours, one at a time", "ours 1", 4.0),
        ("transformers float32, 8 at a time", "theirs 8", 1.5),
    ):
        yield Measured(
            "decode, bench model, 8 at a time, float32",
            peer,
            "tokens/s",
            statistics.median(found["ours 8"]),
            statistics.median(found[other]),
            ratio_of(found["ours 8"], found[other]),
            goal,
            is_time=False,
        )


# --- 5. asking, beside llama.cpp ------------------------------------------------------------------

# ours, llama.cpp's
KINDS = {"float32": "f32", "bfloat16": "f16", "int8": "q8_0", "int4": "q4_0"}
# read, then written
N_READ = 512
N_WRITTEN = 32


def text_model(folder: Path, kind: str) -> Qilin:
    """Ours in one of KINDS; int8 and int4 in the faster dtype around them."""
    if kind in ("float32", "bfloat16"):
        return load_qilin(folder, dtype=getattr(torch, kind))
    dtype, _ = default_dtype("cpu")
    return load_qilin(folder, dtype=getattr(torch, dtype), quantize=kind)


def our_text_rates(model: Qilin) -> tuple[float, float]:
    """Tokens a second read and written of a text of N_READ tokens."""
    ids = [1, *range(1000, 999 + N_READ)]
    ticks = [time.perf_counter()]
    for _ in generate(model, [ids], max_new_tokens=N_WRITTEN + 1, stop=lambda ended: False):
        ticks.append(time.perf_counter())
    return N_READ / (ticks[1] - ticks[0]), (len(ticks) - 2) / (ticks[-1] - ticks[1])


def their_text_rates(server: Any) -> tuple[float, float]:
    reply = server.post(
        "/completion",
        prompt=[1, *range(1000, 999 + N_READ)],
        n_predict=N_WRITTEN + 1,
        temperature=0,
        ignore_eos=True,
        cache_prompt=False,
    )
    timings = reply["timings"]
    return timings["prompt_per_second"], timings["predicted_per_second"]


def beside_llama_cpp(
    runs: int, text: TextConfig, what: str, goals: dict[str, tuple[float | None, float]]
) -> Iterator[Measured]:
    """goals: of each of KINDS that is measured, of reading (None: not told) and of writing."""
    from llama_cpp import Server

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = real_tokenizer(folder)
        save_qilin(random_model(text, SMALL_TOWER), tokenizer, folder / "model")
        for kind, (read_goal, write_goal) in goals.items():
            model = load_qilin(folder / "model")
            save_gguf(model, tokenizer, folder / KINDS[kind], KINDS[kind])
            del model
            ours = text_model(folder / "model", kind)
            server = Server(folder / KINDS[kind], n_threads=torch.get_num_threads())
            found: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
            for run in range(runs + 1):
                pair = {"ours": our_text_rates(ours), "theirs": their_text_rates(server)}
                if run > 0:
                    for side, rates in pair.items():
                        found[side].append(rates)
            server.close()
            del ours
            for i, (act, goal) in enumerate((("prefill", read_goal), ("decode", write_goal))):
                if goal is None:
                    continue
                mine = [rates[i] for rates in found["ours"]]
                other = [rates[i] for rates in found["theirs"]]
                yield Measured(
                    f"{act}, {what}, {kind}",
                    f"llama.cpp {KINDS[kind]} (wheel)",
                    "tokens/s",
                    statistics.median(mine),
                    statistics.median(other),
                    ratio_of(mine, other),
                    goal,
                    is_time=False,
                )


def llamacpp(runs: int) -> Iterator[Measured]:
    goals: dict[str, tuple[float | None, float]] = {
        "float32": (1.5, 0.6),
        "bfloat16": (1.5, 0.75),
        "int8": (1.5, 0.6),
        "int4": (1.5, 0.6),
    }
    yield from beside_llama_cpp(runs, HALF, "0.5 B text", goals)


def blocks13b(runs: int) -> Iterator[Measured]:
    goals: dict[str, tuple[float | None, float]] = {
        "bfloat16": (None, 0.8),
        "int8": (None, 0.8),
        "int4": (None, 0.8),
    }
    yield from beside_llama_cpp(runs, BLOCKS, "four blocks of 13B", goals)


# --- 6. loading -----------------------------------------------------------------------------------

# in a process of its own: what is imported before the clock starts is what loading needs
LOAD_OURS = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from model_io.load import load_qilin
from qilin_min import KVCache
tic = time.perf_counter()
quantize = None if sys.argv[4] == "None" else sys.argv[4]
model = load_qilin(sys.argv[2], dtype=getattr(torch, sys.argv[3]), quantize=quantize)
"""
LOAD_THEIRS = """
import sys, time, torch
from transformers import LlavaForConditionalGeneration
from transformers.models.llava import modeling_llava
tic = time.perf_counter()
dtype = getattr(torch, sys.argv[3])
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[2], dtype=dtype)
"""
TOUCH = """
for p in [*model.parameters(), *model.buffers()]:
    p.detach().flatten()[:: max(1, 4096 // p.element_size())].double().sum()
print(time.perf_counter() - tic)
"""


def load_seconds(code: str, folder: Path, dtype: str, quantize: str | None) -> float:
    done = subprocess.run(
        [sys.executable, "-c", code + TOUCH, ROOT, folder, dtype, str(quantize)],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ, HF_HUB_OFFLINE="1"),
    )
    return float(done.stdout.split()[-1])


def load(runs: int) -> Iterator[Measured]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = random_model(HALF, SMALL_TOWER).bfloat16()
        save_qilin(model, None, folder / "model")
        del model
        save_qilin(load_qilin(folder / "model", quantize="int4"), None, folder / "int4")
        size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        plain = folder / "model"
        works = {
            "ours": lambda: load_seconds(LOAD_OURS, plain, "bfloat16", None),
            "theirs": lambda: load_seconds(LOAD_THEIRS, plain, "bfloat16", None),
            "int4": lambda: load_seconds(LOAD_OURS, plain, "bfloat16", "int4"),
            "saved int4": lambda: load_seconds(LOAD_OURS, folder / "int4", "bfloat16", None),
        }
        found = in_turn(works, runs)
    for work, ours, peer, theirs, goal in (
        (f"load {size / 1e9:.2f} GB", "ours", "transformers from_pretrained", "theirs", 0.8),
        ("load a saved int4 folder", "saved int4", "quantised at load", "int4", 0.3),
    ):
        yield Measured(
            work,
            peer,
            "s",
            statistics.median(found[ours]),
            statistics.median(found[theirs]),
            ratio_of(found[ours], found[theirs]),
            goal,
            is_time=True,
        )


# --- 7. pictures, questions -----------------------------------------------------------------------


def mixed_pictures(folder: Path, n: int) -> list[Path]:
    """PNG and JPEG, grey and in colour, of 300 to 1500 pixels."""
    from PIL import Image

    generator = np.random.default_rng(0)
    paths = []
    for i in range(n):
        width, height = (int(size) for size in generator.integers(300, 1500, 2))
        coarse = generator.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        if i % 3 == 0:
            image = image.convert("L")
        paths.append(folder / f"{i}.{'jpg' if i % 2 else 'png'}")
        image.save(paths[-1])
    return paths


def squared(path: Path) -> Any:
    """As transformers' processors want a picture, which do not pad."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD_COLOR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def pixels(runs: int) -> Iterator[Measured]:
    from transformers import CLIPImageProcessorPil

    sizes = {"height": 336, "width": 336}
    processor = CLIPImageProcessorPil(do_center_crop=False, size=sizes, do_resize=True)
    with tempfile.TemporaryDirectory() as name:
        paths = mixed_pictures(Path(name), 64)
        mine = preprocess_image(paths[0], 336, "pad")
        other = processor(squared(paths[0]), return_tensors="pt")["pixel_values"][0]
        assert (mine - other).abs().max() < 1e-4, "the pictures differ"
        works = {
            "ours": lambda: seconds_of(lambda: [preprocess_image(p, 336, "pad") for p in paths]),
            "theirs": lambda: seconds_of(
                lambda: [processor(squared(p), return_tensors="pt") for p in paths]
            ),
        }
        found = in_turn(works, runs)
    yield Measured(
        "64 mixed pictures to pixels",
        "transformers' processor (PIL)",
        "s",
        statistics.median(found["ours"]),
        statistics.median(found["theirs"]),
        ratio_of(found["ours"], found["theirs"]),
        0.8,
        is_time=True,
    )


class Forgetful(Beginnings):
    """Computes each picture anew for each of its uses, as evaluate.py once did."""

    def cache_for(
        self, prompts: list[list[int]], pixels: torch.Tensor | None, room: int
    ) -> KVCache:
        self.kept.clear()
        return super().cache_for(prompts, pixels, room)

    def _beginnings(self, prompts: list[list[int]], pixels: torch.Tensor | None) -> Any:
        rows = super()._beginnings(prompts, pixels)
        for i, row in enumerate(rows):
            if row is not None:
                # its own, though another row has the same picture
                row.key = (*row.key[:1], f"{row.key[1]} {i}")
        return rows


def questions(runs: int) -> Iterator[Measured]:
    import evaluate
    from evaluation.answers import Predictions
    from evaluation.testsets import Question

    choices = {"A": "左肺有结节", "B": "右肺", "C": "没有异常", "D": "肝脏肿大"}
    model = random_model(BENCH)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = real_tokenizer(folder)
        paths = mixed_pictures(folder, 32)
        n_files = 0

        def ask(kind: type[Beginnings], per_picture: int) -> dict[int, Any]:
            nonlocal n_files
            n_files += 1
            asked = []
            for i in range(32):
                conversation = [{"from": "human", "value": f"第{i}题：图中有什么异常？"}]
                picture = paths[i // per_picture]
                asked.append(
                    Question(i, conversation, "右肺", [picture], 1, choices=choices, letter="B")
                )
            evaluate.Beginnings = kind
            with Predictions(folder / f"{n_files}.jsonl") as predictions:
                evaluate.answer_all(
                    predictions,
                    asked,
                    model,
                    tokenizer,
                    file="bench",
                    batch_size=16,
                    max_new_tokens=4,
                    skip_bad=False,
                )
            evaluate.Beginnings = Beginnings
            return {i: row.seen.answer for i, row in predictions.answered.items()}

        for per_picture, goal in ((1, 0.4), (10, 0.2)):
            assert ask(Beginnings, per_picture) == ask(Forgetful, per_picture)
            found = in_turn(
                {
                    "ours": lambda n=per_picture: seconds_of(lambda: ask(Beginnings, n)),
                    "before": lambda n=per_picture: seconds_of(lambda: ask(Forgetful, n)),
                },
                runs,
            )
            yield Measured(
                f"evaluate, four options, {per_picture} questions a picture",
                "ours, each picture anew for each use",
                "s",
                statistics.median(found["ours"]),
                statistics.median(found["before"]),
                ratio_of(found["ours"], found["before"]),
                goal,
                is_time=True,
            )


ROWS: dict[str, Callable[[int], Iterator[Measured]]] = {
    "stage2": stage2,
    "stage1": stage1,
    "prefill": prefill,
    "decode": decode,
    "decode8": decode8,
    "llamacpp": llamacpp,
    "blocks13b": blocks13b,
    "load": load,
    "pixels": pixels,
    "questions": questions,
}
