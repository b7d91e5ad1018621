"""Speed beside transformers and llama.cpp, measured in turn in one run, as ratios: exit 1 where a
goal is missed. Timings on a shared machine say nothing alone.

python tests/tools/bench.py [ROW …] [--runs 5] [--out out/bench]
    a table of work, ours, peer, ratio, goal and memory, all rows or those named; as JSON and as a
    picture in --out, too. Medians of pairs, in turn; equal results are asserted first. Wants
    tests/requirements.txt, 16 GB of memory, and a machine that does nothing else

More of one thing, no rows of the table:

python tests/tools/bench.py conversions [--runs 7]
    a LLaMA of 1 GB or more on disk until every parameter has been touched; imports excluded
python tests/tools/bench.py loader [--runs 5]
    pictures a second from 1000-pixel JPEGs to batches, 2 worker processes, beside transformers'
    processor
python tests/tools/bench.py padding
    share of padding on lengths like the paper's: our order, random, and the released code's
    grouping
python tests/tools/bench.py saving [--runs 5]
    what an asynchronous checkpoint adds to the step it falls into, beside one that is waited for
python tests/tools/bench.py generate [--runs 5]
    tokens a second of one answer, float32, int8 and int4, beside transformers; batched; memory of
    the quantised layers
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from bench_rows import ROWS
from bench_table import HEAD, describe_machine, machine_line, table_row, write_json, write_picture

import train
from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.pixels import PAD_COLOR
from model_io.tokens import Tokenizer
from qilin_min import IMAGE_TOKEN_INDEX, Qilin, QilinConfig, TextConfig, VisionConfig, generate
from training.batches import Dialogs, batch_order, load_ahead
from training.checkpoints import Checkpoints, Progress
from training.plan import paper_lengths
from training.ranks import setup_distributed


def timed_in_turn(works, runs):
    """{name: [what each of the works gave in `runs` rounds]}; a round before them does not count,
    and every second one goes backwards."""
    results = {name: [] for name in works}
    for run in range(runs + 1):
        names = list(works)
        if run % 2 == 0:
            names.reverse()
        for name in names:
            result = works[name]()
            if run > 0:
                results[name].append(result)
    return results


def pairwise(above, below):
    """The ratios of two lists of timings, pair by pair."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(ratios):
    return f"median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"


# --- load -----------------------------------------------------------------------------------------

# each in a process of its own; what is imported before the clock starts is what loading needs.
# argv: our folder, the LLaMA's, the CLIP's, dtype
LOAD = {
    "qilin-min": """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from model_io import load_qilin
tic = time.perf_counter()
model = load_qilin(llm=sys.argv[2], vision=sys.argv[3], dtype=getattr(torch, sys.argv[4]))""",
    "transformers": """
import sys, time, torch
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama
tic = time.perf_counter()
model = LlamaForCausalLM.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[4]))""",
}
TOUCH = """
for p in model.parameters():
    float(p.detach().view(-1)[:: 4096 // p.element_size()].sum())  # one value of every page
print(time.perf_counter() - tic)"""


def bench_conversions(runs):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(folder)
        missed = False
        for stored, dtype in (
            ("float32", "float32"),
            ("bfloat16", "bfloat16"),
            ("bfloat16", "float32"),
            ("float32", "bfloat16"),
        ):
            ratio = loading_ratio(folder, stored, dtype, runs)
            missed |= stored == dtype and ratio > 1.0
        return missed


def save_models(folder):
    """A small CLIP, and a LLaMA as float32 and as bfloat16."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    clip = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    CLIPVisionModel(clip).save_pretrained(folder / "clip")
    llama = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=8,
        num_attention_heads=16,
    )
    model = LlamaForCausalLM(llama)
    for stored in ("float32", "bfloat16"):
        model.to(getattr(torch, stored))
        model.save_pretrained(folder / stored, max_shard_size="500MB")


def loading_ratio(folder, stored, dtype, runs):
    """The median of our seconds over transformers', which is printed."""

    def seconds_of(code):
        # the first round fills the page cache
        done = subprocess.run(
            [sys.executable, "-c", code + TOUCH, ROOT, folder / stored, folder / "clip", dtype],
            capture_output=True,
            text=True,
            check=True,
            env=dict(os.environ, HF_HUB_OFFLINE="1"),
        )
        return float(done.stdout.split()[-1])

    works = {name: (lambda code=code: seconds_of(code)) for name, code in LOAD.items()}
    seconds = timed_in_turn(works, runs)
    ratios = pairwise(seconds["qilin-min"], seconds["transformers"])
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    size = sum(file.stat().st_size for file in (folder / stored).glob("*.safetensors"))
    print(
        f"load {size / 1e9:.2f} GB {stored} as {dtype}: {json.dumps(medians)} s;"
        f" ratio pair by pair: {spread(ratios)}"
        " (goal: at most 1 when stored and loaded alike)",
        flush=True,
    )
    return statistics.median(ratios)


# --- loader ---------------------------------------------------------------------------------------

N_JPEGS = 192
# pictures a second, with 2 workers
LOADER_GOAL = 60


def bench_loader(runs):
    """Feeding alone: decode, orient, pad, resize, normalise, tokenise, batch; no model."""
    from transformers import CLIPImageProcessorPil

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = scans(folder)
        order = batch_order(data.lengths, 16, 0, 0)
        processor = CLIPImageProcessorPil(
            do_center_crop=False, size={"height": 336, "width": 336}, do_resize=True
        )

        def ours(batches, workers):
            return sum(len(batch["pixel_values"]) for batch in load_ahead(data, batches, workers))

        def theirs():
            n = 0
            for i in range(64):
                done = processor(padded(folder / f"{i}.jpg"), return_tensors="pt")
                n += len(done["pixel_values"])
            return n

        works = {
            "loader, 2 workers": lambda: rate_of(lambda: ours(order * 2, 2)),
            "loader, in this process": lambda: rate_of(lambda: ours(order[:4], 0)),
            "transformers' processor, in this process": lambda: rate_of(theirs),
        }
        rates = timed_in_turn(works, runs)
        size = (folder / "0.jpg").stat().st_size
    medians = {name: statistics.median(values) for name, values in rates.items()}
    shown = "; ".join(f"{name} {rate:.0f}" for name, rate in medians.items())
    with_workers, here, theirs_here = medians.values()
    print(
        f"{N_JPEGS} JPEGs of 1000 pixels ({size / 1e3:.0f} KB the first);"
        f" pictures a second, median of {runs}: {shown};"
        f" one process against transformers' {here / theirs_here:.2f}"
        f" (goal: more than {LOADER_GOAL} with 2 workers)"
    )
    return with_workers <= LOADER_GOAL


def scans(folder):
    """Dialogs of a toy world, each with a JPEG of its own as smooth as a scan, with noise: some
    150 KB each."""
    sizes = ("--language", "8", "--alignment", "8", "--instruction", "8", "--heldout", "1")
    subprocess.run(
        [sys.executable, "-m", "demo.toy", folder / "toy", *sizes],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    row = json.loads((folder / "toy/alignment.json").read_text())[0]
    rng = np.random.default_rng(0)
    for i in range(N_JPEGS):
        scan(rng).save(folder / f"{i}.jpg", quality=90)
    rows = [dict(row, id=str(i), image=f"{i}.jpg") for i in range(N_JPEGS)]
    (folder / "rows.json").write_text(json.dumps(rows))
    setup_distributed()
    return Dialogs(
        [folder / "rows.json"],
        Tokenizer(folder / "toy/llama"),
        576,
        336,
        template="v1",
        max_length=2048,
        images=folder,
        image_mode="pad",
        strict=False,
        out=folder,
    )


def scan(rng):
    from PIL import Image, ImageFilter

    coarse = np.uint8(rng.normal(110, 60, (60, 80, 3)).clip(0, 255))
    size = (1000, int(rng.integers(700, 1001)))
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    smooth = np.asarray(image.filter(ImageFilter.GaussianBlur(2)))
    noisy = smooth + rng.normal(0, 6, smooth.shape)
    return Image.fromarray(np.uint8(noisy.clip(0, 255)))


def padded(path):
    """As transformers' processor wants a picture, which does not pad."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD_COLOR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def rate_of(work):
    """How many a second: work() gives how many."""
    tic = time.perf_counter()
    n = work()
    return n / (time.perf_counter() - tic)


# --- padding --------------------------------------------------------------------------------------

WORLD_SIZE = 8
OURS = "sorted in windows of 50 batches (ours)"


def bench_padding(runs):
    missed = False
    print(
        "| lengths | order | padding, a rank's batch at one time"
        " | waiting for the slowest rank as well | micro-batches of 4 |"
    )
    print("|---|---|---|---|---|")
    for stage, batch_size in ((1, 256), (2, 128)):
        lengths = np.minimum(paper_lengths(stage, 576)[0], 2048)
        for name, order in orders_of(lengths, batch_size).items():
            shares = padding_shares(lengths, order, is_sorted=name != "random")
            missed |= name == OURS and shares[1] > 0.05
            cells = " | ".join(f"{share:.1%}" for share in shares)
            print(f"| stage {stage}, {len(lengths):,} | {name} | {cells} |", flush=True)
    print("goal: ours at most 5 %")
    return missed


def orders_of(lengths, batch_size):
    """{name: [of each global batch the row numbers of each rank]}."""
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(len(lengths))
    starts = range(0, len(lengths), batch_size)
    random = [shuffled[start : start + batch_size].tolist() for start in starts]
    # a Chinese answer is one word to split(): all alike
    by_blanks = np.ones_like(lengths)
    return {
        OURS: [dealt_out(batch) for batch in batch_order(lengths, batch_size, 0, 0)],
        "random": [dealt_out(batch) for batch in random],
        "released grouping, Chinese counted by blanks": released_order(by_blanks, batch_size, rng),
        "released grouping, given true lengths": released_order(lengths, batch_size, rng),
    }


def dealt_out(batch):
    return [batch[rank::WORLD_SIZE] for rank in range(WORLD_SIZE)]


def released_order(lengths, batch_size, rng):
    """The released code's grouping (LLaVA's length-grouped sampler): shuffle, cut into global
    batches, sort each by length, deal it out to ranks so that their sums are alike."""
    order = rng.permutation(len(lengths))
    out = []
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size].tolist()
        batch.sort(key=lambda i: -lengths[i])
        out.append(alike_in_sum(batch, lengths))
    return out


def alike_in_sum(batch, lengths):
    chunks = [[] for _ in range(WORLD_SIZE)]
    sums = [0] * WORLD_SIZE
    room = -(-len(batch) // WORLD_SIZE)
    for i in batch:
        with_room = [rank for rank in range(WORLD_SIZE) if len(chunks[rank]) < room]
        shortest = min(with_room, key=lambda rank: sums[rank])
        chunks[shortest].append(i)
        sums[shortest] += lengths[i]
    return chunks


def padding_shares(lengths, order, is_sorted):
    """[a rank's batch at one time, all waiting for the slowest, micro-batches of 4]: the share of
    positions that are padding. is_sorted: a rank sorts its batch before it is cut."""
    in_batches = 0
    waiting = 0
    in_fours = 0
    for ranks in order:
        per_rank = [[int(lengths[i]) for i in rows] for rows in ranks]
        longest = [max(own, default=0) for own in per_rank]
        in_batches += sum(n * len(own) for n, own in zip(longest, per_rank, strict=True))
        waiting += max(longest) * sum(map(len, per_rank))
        for own in per_rank:
            if is_sorted:
                own.sort(reverse=True)
            fours = [own[i : i + 4] for i in range(0, len(own), 4)]
            in_fours += sum(max(four) * len(four) for four in fours)
    total = float(lengths.sum())
    return [1 - total / n for n in (in_batches, waiting, in_fours)]


# --- saving ---------------------------------------------------------------------------------------


def bench_saving(runs):
    """One process, a model of 60 M parameters (0.7 GB a checkpoint): seconds of save() when it is
    waited for, and when it is not."""
    setup_distributed()
    model, optimizer = model_to_save()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), model, optimizer, {}, n_kept=1)
        seconds = {True: [], False: []}
        step = 0
        for run in range(runs + 1):
            for wait in (True, False):
                step += 1
                tic = time.perf_counter()
                checkpoints.save(Progress(step), wait=wait)
                if run > 0:
                    seconds[wait].append(time.perf_counter() - tic)
                checkpoints.finish()
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.distcp"))
    ratios = pairwise(seconds[False], seconds[True])
    print(
        f"checkpoint of {size / 1e9:.2f} GB:"
        f" a step waits {statistics.median(seconds[False]):.2f} s (copy to memory of its own),"
        f" {statistics.median(seconds[True]):.2f} s if it waits for the disk;"
        f" ratio pair by pair: {spread(ratios)} (goal: below 1)"
    )
    return statistics.median(ratios) >= 1


def model_to_save():
    """(a sharded model of 60 M parameters, its optimiser after a step)."""
    text = TextConfig(
        vocab_size=8000,
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=10,
        num_attention_heads=10,
    )
    model = Qilin(QilinConfig(text, VisionConfig(64, 128, 2, 2, 56, 14)))
    model = train.shard_model(model, torch.device("cpu"), ("mm_projector", "llm"), torch.float32)
    trained = [param for param in model.parameters() if param.requires_grad]
    for param in trained:
        param.grad = torch.zeros_like(param)
    optimizer = torch.optim.AdamW(trained, fused=True)
    optimizer.step()
    return model, optimizer


# --- generate -------------------------------------------------------------------------------------

N_NEW = 32
N_AT_ONCE = 4
PROMPT = [1, *range(100, 140), *[IMAGE_TOKEN_INDEX] * 144, *range(200, 220)]


def bench_generate(runs):
    """A LLaVA of 0.5 billion parameters asked about one picture of 144 patches: 32 new tokens, all
    weights read once for each."""
    models, llava = answering_models()
    pixels = torch.randn(1, 3, 168, 168, generator=torch.Generator().manual_seed(0))
    at_once = {bits: f"{bits}, {N_AT_ONCE} at once" for bits in ("float32", "int8")}
    works = {"transformers float32": lambda: their_speed(llava, pixels)}
    for name, model in models.items():
        works[name] = lambda model=model: our_speed(model, pixels, 1)
    for bits, name in at_once.items():
        works[name] = lambda model=models[bits]: our_speed(model, pixels, N_AT_ONCE)
    speeds = timed_in_turn(works, runs)
    medians = [f"{name} {statistics.median(values):.1f}" for name, values in speeds.items()]
    print("tokens a second, median: " + "; ".join(medians))

    ratios = {}
    for above, below in (
        ("float32", "transformers float32"),
        ("int8", "float32"),
        ("int8", "transformers float32"),
        ("int4", "float32"),
        (at_once["int8"], at_once["float32"]),
    ):
        ratios[f"{above} / {below}"] = statistics.median(pairwise(speeds[above], speeds[below]))
    print(
        "ratio run by run, median: "
        + "; ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        + " (goals: float32 at least 0.9 of transformers, int8 above float32)"
    )

    sizes = {name: quantised_bytes(model) for name, model in models.items()}
    parts = [
        f"{name} {size / 1e6:.0f} MB ({size / sizes['float32']:.3f})"
        for name, size in sizes.items()
    ]
    print(
        f"memory of the quantised layers: {'; '.join(parts)} (goal for int8: at most 0.27)",
    )
    return (
        ratios["float32 / transformers float32"] < 0.9
        or ratios["int8 / float32"] <= 1
        or sizes["int8"] > 0.27 * sizes["float32"]
    )


def answering_models():
    """({bits: our model}, transformers' model), all from one folder."""
    from transformers import LlavaForConditionalGeneration

    config = QilinConfig(
        TextConfig(32064, 2048, 5504, 8, 16, max_position_embeddings=1024),
        VisionConfig(256, 1024, 6, 4, 168, 14),
        n_token_ids=32000,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_qilin(Qilin(config).eval(), None, folder)
        models = {"float32": load_qilin(folder)}
        for bits in ("int8", "int4"):
            models[bits] = load_qilin(folder, quantize=bits)
        llava = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    return models, llava


def our_speed(model, pixels, rows):
    """Tokens a second after the first, which waits for picture and prompt."""
    ticks = []
    for _ in generate(
        model,
        [PROMPT] * rows,
        pixels.expand(rows, -1, -1, -1),
        max_new_tokens=N_NEW,
        stop=lambda ended: False,
    ):
        ticks.append(time.perf_counter())
    return rows * (len(ticks) - 1) / (ticks[-1] - ticks[0])


class Ticks(list):
    """A streamer that notes when each token came."""

    def put(self, value):
        self.append(time.perf_counter())

    def end(self):
        pass


def their_speed(llava, pixels):
    ids = torch.tensor([PROMPT])
    ticks = Ticks()
    llava.generate(
        input_ids=ids.masked_fill(ids == IMAGE_TOKEN_INDEX, llava.config.image_token_id),
        pixel_values=pixels,
        max_new_tokens=N_NEW,
        min_new_tokens=N_NEW,
        do_sample=False,
        streamer=ticks,
    )
    # the first put is the prompt
    return (len(ticks) - 2) / (ticks[-1] - ticks[1])


def quantised_bytes(model):
    """Of the layers that may be quantised, in whatever form they are."""
    n_bytes = 0
    for layer in model.model.layers:
        for name, module in layer.named_modules():
            if name.endswith("_proj"):
                tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
                n_bytes += sum(tensor.nbytes for tensor in tensors)
    return n_bytes


BENCHES = {
    "conversions": bench_conversions,
    "loader": bench_loader,
    "padding": bench_padding,
    "saving": bench_saving,
    "generate": bench_generate,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", help=f"rows: {', '.join(ROWS)} (default: all); or {', '.join(BENCHES)}"
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="counted runs of each (default %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out/bench", help="for bench.json and bench.png"
    )
    args = parser.parse_args()
    unknown = [word for word in args.what if word not in ROWS and word not in BENCHES]
    if unknown:
        parser.error(f"{unknown[0]} is no row: {', '.join([*ROWS, *BENCHES])}")
    is_missed = False
    for name in BENCHES:
        if name in args.what:
            is_missed |= BENCHES[name](args.runs)
    chosen = [name for name in ROWS if name in args.what or not args.what]
    if chosen:
        is_missed |= bench_table(chosen, args.runs, args.out)
    sys.exit(1 if is_missed else 0)


def bench_table(chosen, runs, out):
    """Measures the rows, each printed as it comes, and writes all. -> whether a goal is missed."""
    machine = describe_machine()
    print(machine_line(machine), flush=True)
    print(HEAD, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in chosen:
        for row in ROWS[name](runs):
            print(table_row(row), flush=True)
            rows.append(row)
            # what is measured is not lost to what comes after
            write_json(rows, machine, out / "bench.json")
    write_picture(rows, machine, out / "bench.png")
    n_missed = sum(not row.is_met for row in rows)
    print(f"{len(rows)} lines, {n_missed} goals missed; {out}/bench.json, {out}/bench.png")
    return n_missed > 0


if __name__ == "__main__":
    main()
