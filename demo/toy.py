"""The toy world: small pictures that look like scans, Chinese sentences about them, and tiny untrained weights in the published layouts.

    python -m demo.toy OUT         writes OUT/llama OUT/clip OUT/images OUT/*.json; the same seed gives the same bytes

Everything a real run needs, a thousand times smaller: train.py and sample.py read it through the code that reads the 13B model and ChiMed-VL.
A picture shows 1 to 3 lesions in one quarter of a scan. Modality, quarter, count, shape and size vary independently, with noise, so that
no question can be answered from another, nor without the picture.
"""

import argparse
import io
import random
import shutil
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from common.files import check_ranges, check_replaceable, replace_folder, run_cli, write_json
from common.rows import Records
from model_io.export import hf_configs, save_tensors
from model_io.tokens import SYSTEM
from qilin_min import IMAGE_TOKEN, Qilin, QilinConfig, TextConfig, VisionConfig, part_of

# --- 1. what can be seen, and how it is said ------------------------------------------------------------------------

WORLD = {  # one value of each is drawn for a picture, all equally likely
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
TEXT_SCENE = "检查：{modality}；位置：{place}；数目：{count}；形状：{shape}；大小：{size}。\n"  # what the language model reads before it has eyes


# --- 2. pictures ----------------------------------------------------------------------------------------------------


def draw(scene, rng):
    """A PIL image (grey in RGB, 62 to 66 pixels a side, not always square) of a scene, with noise and jitter from numpy's rng."""
    width, height = (int(n) for n in rng.integers(62, 67, 2))
    noise = rng.normal(0, 1, (height, width))
    rows, cols = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1) - 0.5
    body = (rows**2 + cols**2 < 0.235).astype(float)
    base, spread, tint = {  # background, noise and tint differ by modality, with overlap
        "CT": (70 + 40 * body, 9, (1.0, 1.0, 1.0)),
        "X光": (105 - 50 * np.abs(cols) + 12 * np.sin(rows * 40), 7, (1.0, 1.0, 1.0)),
        "超声": (
            60 * (rows + 0.7) * (np.abs(cols) < 0.15 + 0.45 * (rows + 0.5)),
            9,
            (1.0, 0.95, 0.85),
        ),
        "磁共振": (30 + 75 * body * (1 - rows**2), 5, (0.9, 0.97, 1.0)),
    }[scene["modality"]]
    pixels = np.clip(base * rng.uniform(0.85, 1.15) + spread * noise, 0, 160)
    image = Image.fromarray(np.uint8(np.clip(pixels[..., None] * np.array(tint), 0, 255)))
    lesions = Image.new("L", (width, height))
    pen = ImageDraw.Draw(lesions)
    cell_w, cell_h = (
        width / 4,
        height / 4,
    )  # a quarter has 2 x 2 cells, each holds at most one lesion, somewhere inside
    centres = []
    for cell in rng.permutation(4)[: 1 + WORLD["count"].index(scene["count"])]:
        r = rng.uniform(5.2, 6.4) if scene["size"] == "较大" else rng.uniform(2.9, 3.9)
        x = (2 * ("右" in scene["place"]) + cell % 2 + 0.5) * cell_w + rng.uniform(-1, 1) * (
            cell_w / 2 - r
        )
        y = (2 * ("下" in scene["place"]) + cell // 2 + 0.5) * cell_h + rng.uniform(-1, 1) * (
            cell_h / 2 - r
        )
        centres.append((x, y, r))
    for x, y, r in centres:
        box, light = (x - r, y - r, x + r, y + r), int(rng.integers(190, 256))
        if scene["shape"] == "圆形":
            pen.ellipse(box, fill=light)
        elif scene["shape"] == "环形":
            pen.ellipse(box, outline=light, width=max(1, round(r / 3)))
        elif scene["shape"] == "方形":
            pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=light)
        else:
            pen.line((x - r, y, x + r, y), fill=light, width=max(1, round(r / 2.5)))
            pen.line((x, y - r, x, y + r), fill=light, width=max(1, round(r / 2.5)))
    lesions = lesions.filter(ImageFilter.GaussianBlur(0.5))
    return Image.composite(Image.new("RGB", image.size, (255, 255, 255)), image, lesions)


# --- 3. dialogs -----------------------------------------------------------------------------------------------------


def turns(*texts):
    """[{"from": human, "value": …}, {"from": gpt, …}, …] of texts that alternate."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def ask_all(scene, rng, first=""):
    """One dialog with every kind of question in random order, `first` standing before the first."""
    kinds = rng.sample(list(WORLD), len(WORLD))
    texts = [t for kind in kinds for t in (rng.choice(QUESTIONS[kind]), scene[kind] + "。")]
    return turns(first + texts[0], *texts[1:])


def build_dialogs(out, seed, n_language, n_alignment, n_instruction, n_heldout):
    """Write the pictures and the four JSON files of the published form."""
    rng, pixels = random.Random(seed), np.random.default_rng(seed)
    picture = IMAGE_TOKEN + "\n"

    def draw_scene():
        return {kind: rng.choice(values) for kind, values in WORLD.items()}

    def describe(scene):
        return rng.choice(CAPTIONS).format(**scene)

    language = []
    for i in range(n_language):
        scene = draw_scene()
        text = TEXT_SCENE.format(**scene)
        dialog = (
            ask_all(scene, rng, text)
            if i % 2
            else turns(text + rng.choice(CAPTION_REQUESTS), describe(scene))
        )
        language.append({"id": f"language-{i}", "conversations": dialog})
    write_json(out / "language.json", language)

    bar = tqdm(
        total=n_alignment + n_instruction + n_heldout, desc="pictures", unit="", disable=None
    )

    def make(name, n, dialog):
        rows = []
        for i in range(n):
            scene = draw_scene()
            file = f"{name}-{i:05d}.png"
            draw(scene, pixels).save(out / "images" / file, compress_level=1)
            rows += [dict(row, image=file) for row in dialog(f"{name}-{i}", scene)]
            bar.update()
        return rows

    def caption(id, scene):
        return [
            {
                "id": id,
                "conversations": turns(picture + rng.choice(CAPTION_REQUESTS), describe(scene)),
            }
        ]

    def questions(id, scene):
        return [{"id": id, "conversations": ask_all(scene, rng, picture)}]

    def single(id, scene):
        return [
            {
                "id": f"{id}-{kind}",
                "kind": kind,
                "conversations": turns(picture + rng.choice(QUESTIONS[kind]), scene[kind] + "。"),
            }
            for kind in WORLD
        ]

    write_json(out / "alignment.json", make("alignment", n_alignment, caption))
    write_json(out / "instruction.json", make("instruction", n_instruction, questions))
    write_json(out / "heldout.json", make("heldout", n_heldout, single))
    write_json(out / "heldout_captions.json", make("heldout-caption", n_heldout, caption))
    write_json(
        out / "heldout_language.json",
        [
            {
                "id": f"heldout-language-{i}",
                "conversations": ask_all(scene, rng, TEXT_SCENE.format(**scene)),
            }
            for i, scene in enumerate(draw_scene() for _ in range(64))
        ],
    )
    bar.close()


# --- 4. a tokenizer and tiny weights, in the published layouts -------------------------------------------------------


def train_tokenizer(out, texts, vocab_size):
    """A sentencepiece model with LLaMA's settings (BPE, byte fallback, a blank in front, nothing normalised) at out/tokenizer.model."""
    model = (
        io.BytesIO()
    )  # a file prefix would be written into the model: the same world would not be the same bytes
    sentencepiece.SentencePieceTrainer.train(
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
def save_random_weights(out, text, vision, seed):
    """out/llama and out/clip: Hugging Face folders with random weights of the given sizes, under the names of the published files."""
    torch.manual_seed(seed)
    model = Qilin(QilinConfig(text, vision))
    for name, param in model.named_parameters():
        if (
            param.ndim > 1
        ):  # LLaMA: std 0.02 is made for width 4096 and up; 1 / sqrt(fan_in) is the same idea at any width
            param.normal_(0, param[0].numel() ** -0.5)
    model.model.embed_tokens.weight.normal_(0, 0.5)
    tower = model.vision_tower  # untrained but never to be trained: pixels must reach its output, so they weigh more than attention's mixing
    tower.embeddings.position_embedding.weight.normal_(0, 0.3)
    for layer in tower.encoder.layers:
        layer.self_attn.out_proj.weight.mul_(0.5)
    llm = {name: p.clone() for name, p in model.named_parameters() if part_of(name) == "llm"}
    clip = {
        name.replace("vision_tower.", "vision_model.", 1): p.clone()
        for name, p in model.named_parameters()
        if part_of(name) == "vision_tower"
    }
    save_tensors(llm, out / "llama" / "model.safetensors")
    save_tensors(clip, out / "clip" / "model.safetensors")
    config = hf_configs(model.config, text.vocab_size, text.vocab_size, "float32")["config.json"]
    write_json(out / "llama" / "config.json", config["text_config"])
    write_json(
        out / "clip" / "config.json",
        dict(config["vision_config"], architectures=["CLIPVisionModel"]),
    )


def ask(out):
    """Three lines for demo.sh: a held-out picture, a question about it, and its answer."""
    row = next((row for row in Records(out / "heldout.json") if row["kind"] == "shape"), None)
    if row is None:
        raise ValueError(f"{out}: no question about a shape in heldout.json")
    question, answer = (turn["value"] for turn in row["conversations"])
    print(
        out / "images" / row["image"], question.removeprefix(IMAGE_TOKEN).strip(), answer, sep="\n"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", type=Path, help="folder to write; a toy world that is there already is replaced"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed, another world (default %(default)s)"
    )
    parser.add_argument(
        "--language", type=int, default=2800, help="text-only dialogs (default %(default)s)"
    )
    parser.add_argument(
        "--alignment",
        type=int,
        default=2400,
        help="pictures with captions, stage 1 (default %(default)s)",
    )
    parser.add_argument(
        "--instruction",
        type=int,
        default=4400,
        help="pictures with questions, stage 2 (default %(default)s)",
    )
    parser.add_argument(
        "--heldout",
        type=int,
        default=120,
        help="unseen pictures, 5 questions each (default %(default)s)",
    )
    parser.add_argument(
        "--ask",
        action="store_true",
        help="write nothing; print a held-out picture, a question and its answer from OUT",
    )
    args = parser.parse_args()
    if args.ask:
        return ask(args.out)
    check_ranges(
        args,
        seed=(0, 2**31),
        language=(1, 10**7),
        alignment=(1, 10**7),
        instruction=(1, 10**7),
        heldout=(1, 10**7),
    )
    check_replaceable(args.out, "language.json")
    out = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(out, ignore_errors=True)
    for folder in ("images", "llama", "clip"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    build_dialogs(out, args.seed, args.language, args.alignment, args.instruction, args.heldout)
    sentences = [
        text
        for texts in (
            *QUESTIONS.values(),
            CAPTION_REQUESTS,
            CAPTIONS,
            [TEXT_SCENE],
            *WORLD.values(),
        )
        for text in texts
    ]
    train_tokenizer(
        out / "llama",
        (
            [SYSTEM + " USER: ", " ASSISTANT: "] * 20
            + [s.replace("{", " ").replace("}", " ") for s in sentences]
        ),
        512,
    )
    text = TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        max_position_embeddings=2048,
    )
    vision = VisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
    )
    save_random_weights(out, text, vision, args.seed)
    replace_folder(out, args.out)
    print(
        f"{args.out}: {args.language} dialogs, {args.alignment} captioned pictures, {args.instruction} pictures with questions, "
        f"{args.heldout} unseen pictures with {len(WORLD)} questions each; untrained weights in llama/ and clip/"
    )


if __name__ == "__main__":
    run_cli(main)
