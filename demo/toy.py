"""The toy world: small pictures that look like scans, Chinese sentences about them, and tiny
untrained weights in the published layouts.

    python -m demo.toy OUT
        writes OUT/llama OUT/clip OUT/images OUT/*.json; the same seed gives the same bytes

Everything a real run needs, a thousand times smaller: train.py and sample.py read it through the
code that reads the 13B model and ChiMed-VL. A picture shows 1 to 3 lesions in one quarter of a
scan. Modality, quarter, count, shape and size vary independently, with noise, so that no question
can be answered from another, nor without the picture.
"""

import argparse
import io
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from common.files import check_replaceable, replace_folder, run_cli, write_json
from common.options import InRange
from common.rows import Records
from model_io.export import hf_configs, save_tensors
from model_io.tokens import SYSTEM
from qilin_min import IMAGE_TOKEN, Qilin, QilinConfig, TextConfig, VisionConfig, part_of

# one value of each kind, in its words
Scene = dict[str, str]

# --- 1. what can be seen, and how it is said ------------------------------------------------------

# one value of each is drawn for a picture, all equally likely
WORLD = {
    "modality": ["CT", "X光", "超声", "磁共振"],
    "place": ["左上", "右上", "左下", "右下"],
    "count": ["一个", "两个", "三个"],
    "shape": ["圆形", "环形", "方形", "十字形"],
    "size": ["较小", "较大"],
}
QUESTIONS = {
    "modality": ["这是哪种检查的图像？", "这张图像是用什么方法拍摄的？", "请判断图像的检查方式。"],
    "place": ["病灶位于图像的什么位置？", "病灶在哪个区域？", "请指出病灶所在的区域。"],
    "count": ["图中有几个病灶？", "可以看到多少个病灶？", "请数一数病灶的数目。"],
    "shape": ["病灶是什么形状？", "病灶的形态如何？", "请描述病灶的形状。"],
    "size": ["病灶的大小如何？", "病灶是大还是小？", "请判断病灶的大小。"],
}
CAPTION_REQUESTS = [
    "请描述这张医学图像。",
    "请为这张图像写一段说明。",
    "这张图像显示了什么？",
    "请概括图像所见。",
]
CAPTIONS = [
    "{modality}图像，{place}区域可见{count}{size}的{shape}病灶。",
    "本次{modality}检查于{place}区域发现{count}{shape}病灶，{size}。",
]
# what the language model reads before it has eyes
TEXT_SCENE = "检查：{modality}；位置：{place}；数目：{count}；形状：{shape}；大小：{size}。\n"


# --- 2. pictures ----------------------------------------------------------------------------------


def background(modality: str, height: int, width: int) -> tuple[np.ndarray, int, tuple]:
    """(grey (height, width), spread of its noise, tint): they differ by modality, with overlap."""
    sides = np.array([height, width]).reshape(2, 1, 1)
    rows, cols = np.mgrid[0:height, 0:width] / sides - 0.5
    body = (rows**2 + cols**2 < 0.235).astype(float)
    if modality == "CT":
        return 70 + 40 * body, 9, (1.0, 1.0, 1.0)
    if modality == "X光":
        return 105 - 50 * np.abs(cols) + 12 * np.sin(rows * 40), 7, (1.0, 1.0, 1.0)
    if modality == "超声":
        fan = np.abs(cols) < 0.15 + 0.45 * (rows + 0.5)
        return 60 * (rows + 0.7) * fan, 9, (1.0, 0.95, 0.85)
    return 30 + 75 * body * (1 - rows**2), 5, (0.9, 0.97, 1.0)


def place_lesions(
    scene: Scene, height: int, width: int, rng: np.random.Generator
) -> list[tuple[float, float, float]]:
    """(x, y, radius) in pixels of each lesion.

    A quarter has 2 x 2 cells, each holds at most one lesion, somewhere inside.
    """
    cell_width = width / 4
    cell_height = height / 4
    first_column = 2 * ("右" in scene["place"])
    first_row = 2 * ("下" in scene["place"])
    n_lesions = 1 + WORLD["count"].index(scene["count"])
    lesions = []
    for cell in rng.permutation(4)[:n_lesions]:
        low, high = (5.2, 6.4) if scene["size"] == "较大" else (2.9, 3.9)
        radius = rng.uniform(low, high)
        x = (first_column + cell % 2 + 0.5) * cell_width
        x += rng.uniform(-1, 1) * (cell_width / 2 - radius)
        y = (first_row + cell // 2 + 0.5) * cell_height
        y += rng.uniform(-1, 1) * (cell_height / 2 - radius)
        lesions.append((x, y, radius))
    return lesions


def draw_lesion(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, light: int
) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "圆形":
        pen.ellipse(box, fill=light)
    elif shape == "环形":
        pen.ellipse(box, outline=light, width=max(1, round(radius / 3)))
    elif shape == "方形":
        half = 0.85 * radius
        pen.rectangle((x - half, y - half, x + half, y + half), fill=light)
    else:
        stroke = max(1, round(radius / 2.5))
        pen.line((x - radius, y, x + radius, y), fill=light, width=stroke)
        pen.line((x, y - radius, x, y + radius), fill=light, width=stroke)


def draw_scan(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """A picture (grey in RGB, 62 to 66 pixels a side, not always square) of a scene, with noise and
    jitter from numpy's rng.
    """
    width, height = (int(n) for n in rng.integers(62, 67, 2))
    noise = rng.normal(0, 1, (height, width))
    grey, spread, tint = background(scene["modality"], height, width)
    pixels = np.clip(grey * rng.uniform(0.85, 1.15) + spread * noise, 0, 160)
    # (height, width, 3)
    tinted = pixels[..., None] * np.array(tint)
    image = Image.fromarray(np.uint8(np.clip(tinted, 0, 255)))
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    for x, y, radius in place_lesions(scene, height, width, rng):
        draw_lesion(pen, scene["shape"], x, y, radius, light=int(rng.integers(190, 256)))
    mask = mask.filter(ImageFilter.GaussianBlur(0.5))
    white = Image.new("RGB", image.size, (255, 255, 255))
    return Image.composite(white, image, mask)


# --- 3. dialogs -----------------------------------------------------------------------------------


def alternating(*texts: str) -> list[dict[str, str]]:
    """[{"from": human, "value": …}, {"from": gpt, …}, …] of texts that alternate."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


class Speaker:
    """Draws scenes, and words for them, from one seed."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    def scene(self) -> Scene:
        return {kind: self.rng.choice(values) for kind, values in WORLD.items()}

    def described(self, scene: Scene, first: str) -> list[dict[str, str]]:
        """One dialog that asks for a caption and gives it, `first` standing before the request."""
        request = first + self.rng.choice(CAPTION_REQUESTS)
        return alternating(request, self.rng.choice(CAPTIONS).format(**scene))

    def asked(self, scene: Scene, first: str) -> list[dict[str, str]]:
        """One dialog with every kind of question in random order, `first` before the first."""
        texts = []
        for kind in self.rng.sample(list(WORLD), len(WORLD)):
            texts += [self.rng.choice(QUESTIONS[kind]), scene[kind] + "。"]
        return alternating(first + texts[0], *texts[1:])

    def asked_once(self, scene: Scene, kind: str, first: str) -> list[dict[str, str]]:
        """One question of a kind and its answer."""
        return alternating(first + self.rng.choice(QUESTIONS[kind]), scene[kind] + "。")


def build_text_dialogs(speaker: Speaker, n: int) -> list[dict[str, Any]]:
    """What the language model learns its language from: captions and questions by turns."""
    rows = []
    for i in range(n):
        scene = speaker.scene()
        text = TEXT_SCENE.format(**scene)
        dialog = speaker.asked(scene, text) if i % 2 else speaker.described(scene, text)
        rows.append({"id": f"language-{i}", "conversations": dialog})
    return rows


def build_heldout_text(speaker: Speaker, n: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(n):
        scene = speaker.scene()
        dialog = speaker.asked(scene, TEXT_SCENE.format(**scene))
        rows.append({"id": f"heldout-language-{i}", "conversations": dialog})
    return rows


def build_dialogs(
    out: Path, seed: int, n_language: int, n_alignment: int, n_instruction: int, n_heldout: int
) -> None:
    """Write the pictures and the JSON files of the published form."""
    speaker = Speaker(seed)
    pixels = np.random.default_rng(seed)
    picture = IMAGE_TOKEN + "\n"
    write_json(out / "language.json", build_text_dialogs(speaker, n_language))

    n_pictures = n_alignment + n_instruction + n_heldout
    bar = tqdm(total=n_pictures, desc="pictures", unit="", disable=None)

    def captioned(name: str, scene: Scene) -> list[dict[str, Any]]:
        return [{"id": name, "conversations": speaker.described(scene, picture)}]

    def questioned(name: str, scene: Scene) -> list[dict[str, Any]]:
        return [{"id": name, "conversations": speaker.asked(scene, picture)}]

    def one_by_one(name: str, scene: Scene) -> list[dict[str, Any]]:
        rows = []
        for kind in WORLD:
            dialog = speaker.asked_once(scene, kind, picture)
            rows.append({"id": f"{name}-{kind}", "kind": kind, "conversations": dialog})
        return rows

    def write_rows(
        file: str, name: str, n: int, rows_of: Callable[[str, Scene], list[dict[str, Any]]]
    ) -> None:
        rows = []
        for i in range(n):
            scene = speaker.scene()
            image = f"{name}-{i:05d}.png"
            draw_scan(scene, pixels).save(out / "images" / image, compress_level=1)
            rows += [dict(row, image=image) for row in rows_of(f"{name}-{i}", scene)]
            bar.update()
        write_json(out / file, rows)

    write_rows("alignment.json", "alignment", n_alignment, captioned)
    write_rows("instruction.json", "instruction", n_instruction, questioned)
    write_rows("heldout.json", "heldout", n_heldout, one_by_one)
    write_rows("heldout_captions.json", "heldout-caption", n_heldout, captioned)
    write_json(out / "heldout_language.json", build_heldout_text(speaker, 64))
    bar.close()


# --- 4. a tokenizer and tiny weights, in the published layouts ------------------------------------


def tokenizer_texts() -> list[str]:
    """Every sentence of the toy world, and the prompt's own words often enough to become pieces."""
    sentences = []
    for texts in (*QUESTIONS.values(), CAPTION_REQUESTS, CAPTIONS, [TEXT_SCENE], *WORLD.values()):
        sentences += [text.replace("{", " ").replace("}", " ") for text in texts]
    return [SYSTEM + " USER: ", " ASSISTANT: "] * 20 + sentences


def train_tokenizer(out: Path, texts: Iterable[str], vocab_size: int) -> None:
    """A sentencepiece model with LLaMA's settings (BPE, byte fallback, a blank in front, nothing
    normalised) at out/tokenizer.model.
    """
    # not a file: its name would be written into the model, and the same world would not be the
    # same bytes
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
        max_sentence_length=100_000,
    )
    (out / "tokenizer.model").write_bytes(model.getvalue())


@torch.no_grad()
def random_model(text: TextConfig, vision: VisionConfig, seed: int) -> Qilin:
    """A Qilin whose random weights let something through at any width."""
    torch.manual_seed(seed)
    model = Qilin(QilinConfig(text, vision))
    for param in model.parameters():
        if param.ndim > 1:
            # LLaMA: std 0.02 is made for width 4096 and up; 1 / sqrt(fan_in) is the same idea at
            # any width
            param.normal_(0, param[0].numel() ** -0.5)
    model.model.embed_tokens.weight.normal_(0, 0.5)
    # the tower is untrained but never to be trained: pixels must reach its output, so they weigh
    # more than attention's mixing
    tower = model.vision_tower
    tower.embeddings.position_embedding.weight.normal_(0, 0.3)
    for layer in tower.encoder.layers:
        layer.self_attn.out_proj.weight.mul_(0.5)  # pyright: ignore
    return model


def save_random_weights(out: Path, text: TextConfig, vision: VisionConfig, seed: int) -> None:
    """out/llama and out/clip: Hugging Face folders with random weights of the given sizes, under
    the names of the published files.
    """
    model = random_model(text, vision, seed)
    llm = {}
    clip = {}
    for name, param in model.named_parameters():
        tensor = param.detach().clone()
        if part_of(name) == "llm":
            llm[name] = tensor
        elif part_of(name) == "vision_tower":
            clip[name.replace("vision_tower.", "vision_model.", 1)] = tensor
    save_tensors(llm, out / "llama" / "model.safetensors")
    save_tensors(clip, out / "clip" / "model.safetensors")
    config = hf_configs(model.config, text.vocab_size, text.vocab_size, "float32")["config.json"]
    write_json(out / "llama" / "config.json", config["text_config"])
    clip_config = dict(config["vision_config"], architectures=["CLIPVisionModel"])
    write_json(out / "clip" / "config.json", clip_config)


# --- 5. command -----------------------------------------------------------------------------------


def print_question(out: Path) -> None:
    """Three lines for demo.sh: a held-out picture, a question about it, and its answer."""
    for row in Records(out / "heldout.json"):
        if row["kind"] == "shape":
            question, answer = (turn["value"] for turn in row["conversations"])
            print(out / "images" / row["image"])
            print(question.removeprefix(IMAGE_TOKEN).strip())
            print(answer)
            return
    raise ValueError(f"{out}: no question about a shape in heldout.json")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", type=Path, help="folder to write; a toy world that is there already is replaced"
    )
    add = parser.add_argument
    add(
        "--seed",
        action=InRange,
        type=int,
        low=0,
        high=2**31,
        default=0,
        help="another seed, another world (default %(default)s)",
    )
    for name, default, what in (
        ("--language", 2800, "text-only dialogs"),
        ("--alignment", 2400, "pictures with captions, stage 1"),
        ("--instruction", 5600, "pictures with questions, stage 2"),
        ("--heldout", 120, "unseen pictures, 5 questions each"),
    ):
        add(
            name,
            action=InRange,
            type=int,
            low=1,
            high=10**7,
            default=default,
            help=f"{what} (default %(default)s)",
        )
    add(
        "--ask",
        action="store_true",
        help="write nothing; print a held-out picture, a question and its answer from OUT",
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.ask:
        print_question(args.out)
        return
    check_replaceable(args.out, "language.json")
    out = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(out, ignore_errors=True)
    for folder in ("images", "llama", "clip"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    build_dialogs(out, args.seed, args.language, args.alignment, args.instruction, args.heldout)
    train_tokenizer(out / "llama", tokenizer_texts(), 512)
    # the text twice as wide as the tower, as a linear projector for vLLM wants it; rows of
    # multiples of 32, as llama.cpp's 4 and 8 bits want them; patches of which two by two make the
    # cell of a lesion: with patches of 10 76 % of the answers were right, with these 88 %
    text = TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        max_position_embeddings=2048,
    )
    vision = VisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    save_random_weights(out, text, vision, args.seed)
    replace_folder(out, args.out)
    print(
        f"{args.out}: {args.language} dialogs, {args.alignment} captioned pictures, "
        f"{args.instruction} pictures with questions, {args.heldout} unseen pictures with "
        f"{len(WORLD)} questions each; untrained weights in llama/ and clip/"
    )


if __name__ == "__main__":
    run_cli(main)
