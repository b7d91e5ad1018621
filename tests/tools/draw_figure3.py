"""Draws docs/figure3.svg: the two stages, what is frozen and what is trained in each, with sizes.

    python tests/tools/draw_figure3.py [FILE]

In the form of the paper's Figure 3. Every number is that of the code: STAGES of train.py, the parts
of a Qilin of the paper's size on the meta device, the counts of the paper's tables.
"""

import html
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.paper import TABLES
from qilin_min import Qilin, QilinConfig, part_of
from train import STAGES
from training.freeze import trained_names
from training.plan import LLAMA_SIZES, PAPER_TOWER
from training.stages import Stage

WIDTH = 1000
STAGE_HEIGHT = 300
FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans CJK SC', 'PingFang SC', sans-serif"
# fill, border
FROZEN = ("#dbe9f9", "#4a7fb5")
TRAINED = ("#fde3cf", "#d9702a")
DATA = ("#f3f3f3", "#999999")
# what a stage's words are called: what is asked, what is to be said, the set, the stage in Chinese
WORDS = {
    1: (("instruction", "指令"), ("caption", "图注"), "ChiMed-VL-Alignment", "对齐阶段"),
    2: (("question", "问题"), ("answer", "回答"), "ChiMed-VL-Instruction", "指令微调阶段"),
}


@dataclass(frozen=True)
class Box:
    """A box of the drawing, with its place in pixels."""

    x: int
    y: int
    width: int
    height: int


PICTURE = Box(24, 90, 120, 110)
TOWER = Box(180, 90, 160, 110)
ADAPTER = Box(432, 90, 140, 110)
LLM = Box(664, 90, 160, 110)
SAID = Box(860, 90, 116, 110)
ASKED = Box(664, 238, 160, 46)


def paper_config() -> QilinConfig:
    """The sizes that the paper trains."""
    return QilinConfig(text=LLAMA_SIZES["13B"], vision=PAPER_TOWER)


def part_sizes(model: Qilin) -> Counter[str]:
    """{part: number of its parameters}."""
    sizes = Counter()
    for name, param in model.named_parameters():
        sizes[part_of(name)] += param.numel()
    return sizes


def short(n: int) -> str:
    """A number of parameters for people: 5.2 M, 13.02 B."""
    if n >= 10**9:
        return f"{n / 1e9:.2f} B"
    return f"{n / 1e6:.1f} M"


# --- 1. pieces ------------------------------------------------------------------------------------


def text(x: float, y: float, words: str, *, size: int = 14, more: str = "") -> str:
    shown = html.escape(words)
    return f'<text x="{x}" y="{y}" font-size="{size}" {more}>{shown}</text>'


def box(at: Box, colours: tuple[str, str], lines: list[str]) -> list[str]:
    """A box with lines in its middle, the first of them bold."""
    fill, border = colours
    parts = [
        f'<rect x="{at.x}" y="{at.y}" width="{at.width}" height="{at.height}" rx="8" '
        f'fill="{fill}" stroke="{border}" stroke-width="2"/>'
    ]
    middle = at.x + at.width / 2
    top = at.y + at.height / 2 - 9 * (len(lines) - 1) + 5
    for i, line in enumerate(lines):
        weight = "700" if i == 0 else "400"
        more = f'text-anchor="middle" font-weight="{weight}"'
        parts.append(text(middle, top + 18 * i, line, size=13 if i else 14, more=more))
    return parts


def arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#444444" stroke-width="2" '
        'marker-end="url(#head)"/>'
    )


def between(left: Box, right: Box, shape: str = "") -> list[str]:
    """The arrow from a box to the next one, with the shape of what goes along it."""
    y = left.y + left.height // 2
    parts = [arrow(left.x + left.width + 2, y, right.x - 4, y)]
    if shape:
        middle = (left.x + left.width + right.x) / 2
        parts.append(text(middle, y - 8, shape, size=12, more='text-anchor="middle"'))
    return parts


# --- 2. a stage, and both -------------------------------------------------------------------------


def stage_parts(number: int, stage: Stage, model: Qilin) -> list[str]:
    """The elements of a stage, from the top left corner of its own."""
    config = model.config
    sizes = part_sizes(model)
    learning = Counter()
    parameters = dict(model.named_parameters())
    for name in trained_names(model, stage.trained):
        learning[part_of(name)] += parameters[name].numel()
    asked, said, data, chinese = WORDS[number]
    n_rows = TABLES[stage.table].n_pairs
    side = config.vision.image_size
    n = config.n_image_tokens

    parts = [
        text(24, 34, f"Stage {number}: {stage.goal}", size=20, more='font-weight="700"'),
        text(976, 34, f"第 {number} 阶段：{chinese}", size=18, more='text-anchor="end"'),
        text(
            24,
            62,
            f"{data}, {n_rows:,} rows 条 · batch 批 {stage.batch_size} · lr 学习率 {stage.lr:g} · "
            f"trained 训练 {short(learning.total())} of 共 {short(sizes.total())}",
            size=13,
            more='fill="#555555"',
        ),
    ]
    boxes = [
        (TOWER, "vision_tower", "image encoder", "图像编码器", "CLIP ViT-L/14"),
        (ADAPTER, "mm_projector", "adapter", "适配器", "linear 线性层"),
        (LLM, "llm", "LLM", "语言模型", "LLaMA-2"),
    ]
    parts += box(PICTURE, DATA, ["picture", "医学图像", f"{side} × {side} × 3"])
    for at, part, english, own, kind in boxes:
        is_trained = learning[part] > 0
        colours = TRAINED if is_trained else FROZEN
        state = "trained 训练" if is_trained else "frozen 冻结"
        parts += box(at, colours, [english, own, kind, short(sizes[part]), state])
    parts += box(SAID, DATA, list(said))
    parts += box(ASKED, DATA, [" ".join(asked)])
    parts += between(PICTURE, TOWER)
    parts += between(TOWER, ADAPTER, f"{n} × {config.vision.hidden_size}")
    parts += between(ADAPTER, LLM, f"{n} × {config.text.hidden_size}")
    parts += between(LLM, SAID)
    parts.append(arrow(744, ASKED.y - 2, 744, LLM.y + LLM.height + 4))
    parts.append(text(24, 250, "The loss is on the words to be said alone.", size=13))
    parts.append(text(24, 270, "损失只计算要说出的文字。", size=13))
    return parts


def drawing(stages: dict[int, Stage], config: QilinConfig) -> str:
    """The whole drawing as SVG. It brings a light ground along, so that it is read in a dark theme,
    too."""
    with torch.device("meta"):
        model = Qilin(config)
    height = STAGE_HEIGHT * len(stages) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="{FONT}" fill="#222222">',
        "<title>The two stages of training: what is frozen, what is trained</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#444444"/>'
        "</marker></defs>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="12" fill="#ffffff" '
        'stroke="#cccccc"/>',
    ]
    for i, (number, stage) in enumerate(stages.items()):
        y = 10 + STAGE_HEIGHT * i
        if i:
            lines.append(f'<line x1="24" y1="{y}" x2="976" y2="{y}" stroke="#cccccc"/>')
        lines.append(f'<g transform="translate(0 {y})">')
        lines += stage_parts(number, stage, model)
        lines.append("</g>")
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def main() -> None:
    given = sys.argv[1:]
    path = Path(given[0]) if given else ROOT / "docs/figure3.svg"
    path.write_text(drawing(STAGES, paper_config()), encoding="utf-8")


if __name__ == "__main__":
    main()
