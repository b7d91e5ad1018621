"""The demo's 600 questions asked of llama.cpp: both projectors, f16 and q8_0, by completion and by
chat, pictures prepared as we do and as llama.cpp does. Exit 1 where fewer than 98 % of the answers
to prepared pictures are ours.

bash demo.sh && python tests/tools/check_gguf.py out/demo
    trains the other projector first, some three minutes
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
from llama_cpp import MARKER, Server, picture_part
from PIL import Image

from model_io.gguf import save_gguf
from model_io.load import load_qilin
from model_io.pixels import CLIP_MEAN, CLIP_STD, preprocess_image
from model_io.tokens import SYSTEM, Tokenizer, encode_prompt
from qilin_min import answer_ids

KINDS = ("f16", "q8_0")
LEAST = 0.98
MAX_NEW_TOKENS = 40


def train_other(demo):
    """The demo's model once more with a projector of two layers, its stage 2 alone."""
    toy = demo / "toy"
    out = demo / "mlp"
    command = [
        *(sys.executable, ROOT / "train.py"),
        *("--stage", 2),
        *("--model", demo / "language"),
        *("--projector", "fresh"),
        *("--projector-type", "mlp2x_gelu"),
        *("--data", toy / "instruction.json"),
        *("--images", toy / "images"),
        *("--out", out),
        *("--batch-size", 16),
        # as demo.sh's stage 2
        *("--lr", "1.5e-3"),
        *("--epochs", 2),
        *("--workers", 0),
        *("--log-every", 100),
    ]
    subprocess.run(list(map(str, command)), check=True)
    return out


def prepared(path, config):
    """A picture file as the square that the model sees."""
    pixels = preprocess_image(path, config.vision.image_size, config.image_mode)  # (3, H, W)
    pixels = pixels * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def our_answers(model, tokenizer, rows, squares):
    n = model.config.n_image_tokens
    size = model.config.vision.image_size
    answers = []
    for start in range(0, len(rows), 50):
        some = rows[start : start + 50]
        prompts = [encode_prompt(row["conversations"][:1], tokenizer, n) for row in some]
        pixels = torch.stack([preprocess_image(squares[row["image"]], size) for row in some])
        found = answer_ids(model, prompts, pixels, max_new_tokens=MAX_NEW_TOKENS)
        answers += [tokenizer.decode(ids) for ids in found]
    return answers


def question_of(row):
    return row["conversations"][0]["value"].replace("<image>", "").strip()


def ways_of_asking(server, squares, files):
    """{name: a row of the test set -> the answer}"""

    def complete(row):
        prompt = f"{SYSTEM} USER: {MARKER}\n{question_of(row)} ASSISTANT:"
        return server.complete(prompt, [squares[row["image"]]], MAX_NEW_TOKENS)["content"]

    def chat(picture, row):
        parts = [picture_part(picture), {"type": "text", "text": question_of(row)}]
        return server.chat([{"role": "user", "content": parts}], MAX_NEW_TOKENS)

    return {
        "completion": complete,
        "chat": lambda row: chat(squares[row["image"]], row),
        "chat, llama.cpp resizes": lambda row: chat(files[row["image"]], row),
    }


def shares(folder, demo):
    """Yield (kind, way, share of answers that are ours)."""
    model = load_qilin(folder)
    tokenizer = Tokenizer(folder)
    rows = json.loads((demo / "toy/heldout.json").read_text(encoding="utf-8"))
    names = {row["image"] for row in rows}
    squares = {name: prepared(demo / "toy/images" / name, model.config) for name in names}
    files = {name: Image.open(demo / "toy/images" / name) for name in names}
    ours = our_answers(model, tokenizer, rows, squares)
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            save_gguf(model, tokenizer, Path(scratch) / "model", kind)
            server = Server(Path(scratch) / "model")
            for way, ask in ways_of_asking(server, squares, files).items():
                # the blank behind "ASSISTANT:" is the answer's first character there
                equal = [ask(row).strip() == own for row, own in zip(rows, ours, strict=True)]
                yield kind, way, sum(equal) / len(equal)
            server.close()


def main():
    demo = Path(sys.argv[1])
    is_good = True
    for name, folder in (("linear", demo / "stage2"), ("mlp2x_gelu", train_other(demo))):
        for kind, way, share in shares(folder, demo):
            print(
                f"llama.cpp, {name}, {kind}, {way}: {share:.1%} of the answers are ours", flush=True
            )
            is_good &= share >= LEAST or "resizes" in way
    if not is_good:
        print(f"less than {LEAST:.0%}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
