"""Ask Qilin-Med-VL about a picture: one question, a chat, and where it looked.

    python sample.py image.png "图中有什么异常？"
        the model that train.py left in out/stage2
    python sample.py image.png "问题" --model DIR
        any folder: ours, llava-hf, original LLaVA or Qilin
    python sample.py a.png b.dcm "两张图有何不同？"
        several pictures: PNG, JPEG, TIFF, WebP, DICOM …, 8 or 16 bits
    python sample.py "什么是肺结节？"
        text only
    python sample.py --chat image.png
        several turns: /image FILE… takes other pictures, /reset forgets what was said
    python sample.py image.png "问题" --heatmap out.png
        beside the answer, a picture of what it attended to

The answer streams to stdout, everything else goes to stderr. Before a question that begins with a
dash put `--`, after all options. Ctrl-C stops an answer. Too long a prompt is refused, a picture is
never cut. Research code: an answer is no medical advice.
"""

import argparse
import contextlib
import importlib
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import OUT_OF_MEMORY, USER_ERRORS, one_line, run_cli
from common.options import InRange
from model_io.options import add_model_options, open_model
from model_io.pixels import open_image, preprocess_image
from model_io.tokens import TEMPLATES, StreamedAnswer, Tokenizer, build_prompt, encode_prompt
from qilin_min import IMAGE_TOKEN_INDEX, KVCache, Qilin, QilinConfig, apply_rotary_pos_emb

# --- 1. options -----------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="image … question",
        help="picture files, then the question; with --chat only pictures",
    )
    add(
        "--chat",
        action="store_true",
        help="ask on and on about the same pictures; the keys and values of what was said are "
        "kept, no picture is computed twice",
    )
    add(
        "--template",
        default="v1",
        choices=TEMPLATES,
        help="the one it was trained with (default %(default)s)",
    )
    add_answer_options(parser)
    add(
        "--heatmap",
        type=Path,
        default=None,
        metavar="PNG",
        help="draw each picture beside itself under the attention that the answer's tokens paid "
        "to its patches",
    )
    add(
        "--heatmap-layers",
        default=None,
        metavar="A-B",
        help="layers whose heads are averaged, counted from 1 (default: the middle third)",
    )
    add_model_options(parser)
    return parser


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """How an answer is drawn, and where it ends."""
    add = parser.add_argument
    add(
        "--max-new-tokens",
        action=InRange,
        type=int,
        low=1,
        high=10**6,
        default=512,
        help="(default %(default)s)",
    )
    add(
        "--temperature",
        action=InRange,
        type=float,
        low=0,
        high=100,
        default=0.0,
        help="0: the likeliest word each time; 0.2 to 1: more varied (default %(default)s)",
    )
    add(
        "--top-p",
        action=InRange,
        type=float,
        low=1e-9,
        high=1,
        default=1.0,
        help="draw only from the likeliest words that make up this share (default %(default)s)",
    )
    add(
        "--top-k",
        action=InRange,
        type=int,
        low=0,
        high=10**9,
        default=0,
        help="draw only from the k likeliest words; 0: all (default %(default)s)",
    )
    add(
        "--repetition-penalty",
        action=InRange,
        type=float,
        low=1e-3,
        high=1e3,
        default=1.0,
        help="above 1: less repetition (default %(default)s)",
    )
    add(
        "--seed",
        action=InRange,
        type=int,
        low=0,
        high=2**63 - 1,
        default=None,
        help="the same seed draws the same answer",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )


def check_options(
    words: list[str], *, is_chat: bool, template: str, stop: list[str], heat_file: Path | None
) -> None:
    """ValueError or FileNotFoundError for what goes wrong anyway, before a model is loaded."""
    if not all(stop):
        raise ValueError("--stop: the text is empty")
    if is_chat and (heat_file or template != "v1"):
        raise ValueError(
            "--chat goes with template v1 and without --heatmap: ask that one question by itself"
        )
    if not is_chat:
        check_question(words)
    if heat_file:
        if len(words) < 2:
            raise ValueError("--heatmap needs a picture")
        if heat_file.suffix.lower() != ".png" or not heat_file.parent.is_dir():
            raise ValueError(f"--heatmap {heat_file}: must end in .png, in a folder that is there")
    check_pictures(words if is_chat else words[:-1])


def check_question(words: list[str]) -> None:
    """ValueError or FileNotFoundError unless the last word is a question."""
    if not words:
        raise ValueError(
            'what is the question? (python sample.py image.png "…"; --help shows more)'
        )
    question = words[-1]
    if not question.strip():
        raise ValueError("the question is empty")
    if os.path.isfile(question):
        raise ValueError(
            f"the last word must be the question, but {question!r} is a file "
            "(--chat for several questions)"
        )
    suffixes = {*Image.registered_extensions(), ".dcm"}
    if " " not in question and Path(question).suffix.lower() in suffixes:
        raise FileNotFoundError(
            f"no such picture: {question} (and the last word must be the question)"
        )


def check_pictures(paths: Iterable[str]) -> None:
    """ValueError or FileNotFoundError for what is no file, before a model is loaded."""
    for path in paths:
        if "://" in path:
            raise ValueError(f"{path}: only files, no URLs; download the picture first")
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such picture: {path}")


def read_pictures(paths: list[str], config: QilinConfig) -> Tensor | None:
    """float32 (M, 3, H, W) of picture files as the model takes them, or None of none."""
    if not paths:
        return None
    size = config.vision.image_size
    return torch.stack([preprocess_image(path, size, config.image_mode) for path in paths])


# --- 2. chat --------------------------------------------------------------------------------------


def length_in_common(a: list[int], b: list[int]) -> int:
    """How many ids two lists share from the beginning, the last of b left out."""
    n = min(len(a), len(b) - 1)
    for i in range(n):
        if a[i] != b[i]:
            return i
    return n


class Chat:
    """A dialog whose keys and values are kept, so that a turn costs its own words only."""

    def __init__(self, model: Qilin, tokenizer: Tokenizer, pixels: Tensor | None):
        self.model = model
        self.tokenizer = tokenizer
        self.limit = model.config.text.max_position_embeddings
        # of the last turn
        self.answer: StreamedAnswer | None = None
        self.look_at(pixels)

    def look_at(self, pixels: Tensor | None) -> None:
        """Begin anew with other pictures (M, 3, H, W), or None."""
        self.pixels = pixels
        # ids of the dialog so far
        self.said: list[int] = []
        self.cache = KVCache(self.model.config.text.num_hidden_layers, self.limit)
        # ids whose keys and values are in the cache
        self.held: list[int] = []

    def reset(self) -> None:
        """Forget what was said, but not the pictures."""
        self.said = []

    def encode(self, question: str) -> list[int]:
        """The whole dialog with one more question, exactly as encode_prompt would encode it."""
        human = {"from": "human", "value": question}
        if self.said:
            # what follows </s> is encoded by itself
            gpt = {"from": "gpt", "value": "-"}
            last = build_prompt([human, gpt, human], n_images=0)[-1]
            assert isinstance(last.content, str), "a prompt ends in text"
            ids = self.tokenizer.encode(last.content)
            return [*self.said, self.tokenizer.eos_id, *ids]
        n_image_tokens = self.model.config.n_image_tokens
        n_images = 0 if self.pixels is None else len(self.pixels)
        return encode_prompt([human], self.tokenizer, n_image_tokens, n_images=n_images)

    def ask(self, question: str, **options: Any) -> Iterator[str]:
        """Yield the answer's text. An interrupted answer stays in the dialog as far as it came.

        ValueError leaves everything as it was.
        """
        prompt = self.encode(question)
        check_length(prompt, self.limit, "the dialog", "/reset, or a shorter question")
        n = length_in_common(self.held, prompt)
        pixels = None
        if IMAGE_TOKEN_INDEX in prompt[n:]:
            pixels = self.pixels
        if pixels is not None:
            # not all pictures were computed: an answer was interrupted before its first word
            n = 0
        if self.held and self.cache.lengths is not None:
            self.cache.truncate(torch.tensor([n], device=self.cache.lengths.device))
        self.held = prompt[:n]
        answer = StreamedAnswer(
            self.model, self.tokenizer, prompt, pixels, cache=self.cache, **options
        )
        try:
            yield from answer
        finally:
            if self.cache.lengths is not None:
                self.held = (prompt + answer.ids)[: int(self.cache.lengths)]
            if answer.ids:
                self.said = prompt + answer.ids
            self.answer = answer


def check_length(prompt: list[int], limit: int, what: str, remedy: str) -> None:
    if len(prompt) >= limit:
        raise ValueError(
            f"{what} takes {len(prompt)} tokens, the model's positions end at {limit}: {remedy}"
        )


def obey(talk: Chat, command: str, rest: str) -> None:
    """A command of the chat other than /quit. ValueError for one that there is not."""
    if command == "/reset":
        talk.reset()
    elif command == "/image":
        names = shlex.split(rest)
        check_pictures(names)
        talk.look_at(read_pictures(names, talk.model.config))
        print(f"{len(names)} pictures, a new dialog", file=sys.stderr)
    else:
        raise ValueError(f"{command}: there are /image FILE…, /reset and /quit")


def take_turn(talk: Chat, line: str, options: dict[str, Any]) -> None:
    """One line of a chat: a command, or a question that is answered."""
    command, *rest = line.split(None, 1)
    if re.fullmatch("/[a-z]+", command):
        obey(talk, command, rest[0] if rest else "")
        return
    print_answer(talk.ask(line, **options))
    assert talk.answer is not None, "an answer that was printed is there"
    end = unfinished(talk.answer, len(talk.said), talk.limit)
    if end:
        print(end, file=sys.stderr)


def prepare_terminal() -> None:
    # line editing and history, of this run only: questions about patients belong in no file;
    # Windows' terminal edits by itself
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
    print(
        "/image FILE… other pictures   /reset forget what was said   /quit or Ctrl-D end   "
        "Ctrl-C stops an answer",
        file=sys.stderr,
    )


def chat(model: Qilin, tokenizer: Tokenizer, pixels: Tensor | None, options: dict) -> None:
    """Read questions from the terminal, or lines from a pipe, until the end or Ctrl-C at the
    prompt.
    """
    talk = Chat(model, tokenizer, pixels)
    is_person = sys.stdin.isatty()
    if is_person:
        prepare_terminal()
    while True:
        try:
            line = input("> " if is_person else "").strip()
        except EOFError:
            return
        if not line:
            continue
        if line.split()[0] in ("/quit", "/exit"):
            return
        try:
            take_turn(talk, line, options)
        except KeyboardInterrupt:
            if not is_person:
                raise
            print(" (stopped)", file=sys.stderr)
        except USER_ERRORS as error:
            print(one_line(error), file=sys.stderr)
        except torch.OutOfMemoryError:
            print(OUT_OF_MEMORY, file=sys.stderr)


def unfinished(answer: StreamedAnswer, n_tokens: int, limit: int) -> str:
    """Why an answer may have no end, or ""."""
    if answer.finish_reason != "length":
        return ""
    why = "the last position of the model" if n_tokens >= limit else "--max-new-tokens"
    return f" ({why}: the answer may be unfinished)"


def print_answer(texts: Iterable[str]) -> None:
    try:
        for text in texts:
            print(text, end="", flush=True)
    finally:
        print(flush=True)


# --- 3. where the answer looked -------------------------------------------------------------------

# red, green, blue, from little attention to much
COLOURS = np.array([[60, 0, 110], [190, 30, 90], [250, 110, 30], [255, 235, 110]], dtype=np.float32)
# pixels between a picture and what stands beside or below it
GAP = 8


def attention_of(
    attention: Any, x: Tensor, rope: tuple[Tensor, Tensor], chosen_at: slice
) -> Tensor:
    """float32 (A, T): a layer's softmax at positions chosen_at of x (1, T, C), mean of heads."""
    cos, sin = (angles[0].float() for angles in rope)  # (1, T, D) each
    q = attention.q_proj(x)[0].unflatten(-1, (-1, attention.head_dim))  # (T, H, D)
    k = attention.k_proj(x)[0].unflatten(-1, (-1, attention.head_dim))  # (T, H_kv, D)
    q = apply_rotary_pos_emb(q.transpose(0, 1).float(), cos, sin)  # (H, T, D)
    k = apply_rotary_pos_emb(k.transpose(0, 1).float(), cos, sin)  # (H_kv, T, D)
    k = k.repeat_interleave(len(q) // len(k), dim=0)  # (H, T, D)
    scores = q[:, chosen_at] @ k.transpose(1, 2) / attention.head_dim**0.5  # (H, A, T)
    positions = torch.arange(x.shape[1], device=x.device)
    future = positions > positions[chosen_at, None]  # (A, T)
    return scores.masked_fill(future, -torch.inf).softmax(-1).mean(0)  # (A, T)


@torch.no_grad()
def answer_attention(
    model: Qilin, ids: list[int], n_prompt: int, pixel_values: Tensor | None, layers: range
) -> Tensor:
    """float32 (A, T): what each of the A tokens after the first n_prompt of `ids` (a list of T)
    paid attention to when it was chosen, each row of sum 1.

    The softmax is computed here from the queries and keys of one pass over prompt and answer, and
    averaged over all heads of `layers` (indices). Row i is the attention of the position before
    token n_prompt + i, the one whose logits chose it.
    """
    chosen_at = slice(n_prompt - 1, len(ids) - 1)
    attentions = []

    def look(attention: Any, inputs: tuple) -> None:
        attentions.append(attention_of(attention, inputs[0], inputs[1], chosen_at))

    hooks = []
    for i in layers:
        layer: Any = model.model.layers[i]
        hooks.append(layer.self_attn.register_forward_pre_hook(look))
    device = next(model.parameters()).device
    if pixel_values is not None:
        pixel_values = pixel_values.to(device)
    try:
        with torch.compiler.set_stance("force_eager"):
            model(torch.tensor([ids], device=device), pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(attentions).mean(0).cpu()  # (A, T)


def layers_of(text: str | None, n_layers: int) -> range:
    """The layer indices of "A-B", counted from 1.

    None: the middle third, where words have met the picture and do not yet prepare the next word.
    """
    if text is None:
        first = n_layers // 3
        return range(first, max(first + 1, n_layers - first))
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first = int(match[1]) if match else 0
    last = int(match[2] or match[1]) if match else 0
    if not 1 <= first <= last <= n_layers:
        raise ValueError(f"--heatmap-layers {text}: must be like 3-5, within 1 to {n_layers}")
    return range(first - 1, last)


def enlarged(image: Image.Image) -> Image.Image:
    """A picture whose longer side has 512 to 1024 pixels."""
    scale = min(max(512, *image.size), 1024) / max(image.size)
    if scale == 1:
        return image
    width, height = (max(1, round(n * scale)) for n in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def spread_heat(heat: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """float32 (H, W, 1), 0 to 1: the heat of patches (h, w) over a picture of `size`, mapped back
    through preprocess_image's `mode` of squaring.
    """
    width, height = size
    side = max(size) if mode == "pad" else min(size)
    square = Image.fromarray(np.float32(heat / max(heat.max(), 1e-12)))
    square = square.resize((side, side), Image.Resampling.BILINEAR)
    whole = Image.new("F", size)
    whole.paste(square, ((width - side) // 2, (height - side) // 2))
    return np.asarray(whole)[..., None]


def draw_heat(image: Image.Image, heat: np.ndarray, mode: str) -> Image.Image:
    """The picture, and beside it the same under `heat` (h, w) of its patches."""
    image = enlarged(image)
    strength = spread_heat(heat, image.size, mode)  # (H, W, 1)
    place = strength * (len(COLOURS) - 1)
    low = np.minimum(place.astype(int), len(COLOURS) - 2)[..., 0]
    colour = COLOURS[low] + (place - low[..., None]) * (COLOURS[low + 1] - COLOURS[low])
    pixels = np.asarray(image, dtype=np.float32)
    alpha = 0.75 * np.sqrt(strength)
    heated = Image.fromarray(np.uint8(np.rint(pixels * (1 - alpha) + colour * alpha)))
    pair = Image.new("RGB", (2 * image.width + GAP, image.height), (255, 255, 255))
    pair.paste(image, (0, 0))
    pair.paste(heated, (image.width + GAP, 0))
    return pair


def write_sheet(pairs: list[Image.Image], out: Path) -> None:
    """Pictures one under the other, in a PNG that appears whole."""
    width = max(pair.width for pair in pairs)
    height = sum(pair.height + GAP for pair in pairs) - GAP
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    top = 0
    for pair in pairs:
        sheet.paste(pair, (0, top))
        top += pair.height + GAP
    partial = out.with_name(out.name + ".partial")
    sheet.save(partial, "PNG")
    os.replace(partial, out)


def heatmap(
    model: Qilin,
    prompt: list[int],
    answer: list[int],
    paths: list[str],
    pixels: Tensor | None,
    layers: range,
    out: Path,
) -> None:
    """Write the heat of all pictures, one under the other, and say how much of the attention went
    to them.
    """
    if not answer:
        raise ValueError("no heatmap: the answer has no tokens")
    config = model.config
    ids = prompt + answer
    attention = answer_attention(model, ids, len(prompt), pixels, layers).mean(0)  # (T,)
    places = torch.tensor(ids) == IMAGE_TOKEN_INDEX
    side = config.vision.image_size // config.vision.patch_size
    heats = attention[places].view(len(paths), side, side).numpy()
    pairs = []
    for path, heat in zip(paths, heats, strict=True):
        pairs.append(draw_heat(open_image(path), heat, config.image_mode))
    write_sheet(pairs, out)
    share = float(attention[places].sum())
    share_of_tokens = float(places.float().mean())
    print(
        f"{out}: {share:.1%} of the attention went to the picture, whose patches are "
        f"{share_of_tokens:.1%} of the tokens (mean of all heads, layers {layers[0] + 1} to "
        f"{layers[-1] + 1}, {len(answer)} tokens)",
        file=sys.stderr,
    )


# --- 4. main --------------------------------------------------------------------------------------


def encode_one(
    question: str, n_pictures: int, tokenizer: Tokenizer, config: QilinConfig, template: str
) -> list[int]:
    """The prompt of one question. ValueError when it does not fit."""
    conversation = [{"from": "human", "value": question}]
    prompt = encode_prompt(
        conversation, tokenizer, config.n_image_tokens, template, n_images=n_pictures
    )
    what = "the question"
    if n_pictures == 1:
        what = "the question with 1 picture"
    elif n_pictures > 1:
        what = f"the question with {n_pictures} pictures"
    limit = config.text.max_position_embeddings
    check_length(prompt, limit, what, "fewer pictures, or a shorter question")
    return prompt


def main() -> None:
    args = build_parser().parse_intermixed_args()
    check_options(
        args.words,
        is_chat=args.chat,
        template=args.template,
        stop=args.stop,
        heat_file=args.heatmap,
    )
    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
        "stop": args.stop,
    }
    paths = args.words if args.chat else args.words[:-1]
    tic = time.perf_counter()
    model, tokenizer, device = open_model(
        args.model,
        llm=args.llm,
        vision=args.vision,
        projector=args.projector,
        base=args.base,
        device=args.device,
        dtype=args.dtype,
        quantize=args.quantize,
        is_compiled=args.compile,
        is_eager=args.eager,
    )
    text = model.config.text
    layers = layers_of(args.heatmap_layers, text.num_hidden_layers)
    pixels = read_pictures(paths, model.config)  # (M, 3, H, W)
    print(
        f"{text.num_hidden_layers}-layer model loaded on {device} in "
        f"{time.perf_counter() - tic:.1f} s. Research code: no medical advice.",
        file=sys.stderr,
    )
    if args.template == "plain":
        print("template plain has no place for a question: it is not read", file=sys.stderr)
    if args.chat:
        chat(model, tokenizer, pixels, options)
        return

    prompt = encode_one(args.words[-1], len(paths), tokenizer, model.config, args.template)
    tic = time.perf_counter()
    answer = StreamedAnswer(model, tokenizer, prompt, pixels, **options)
    print_answer(answer)
    seconds = time.perf_counter() - tic
    end = unfinished(answer, len(prompt) + answer.n_new, text.max_position_embeddings)
    print(
        f"{len(prompt)} tokens read, {answer.n_new} written, "
        f"{answer.n_new / seconds:.1f} a second{end}",
        file=sys.stderr,
    )
    if args.heatmap:
        heatmap(model, prompt, answer.ids, paths, pixels, layers, args.heatmap)


if __name__ == "__main__":
    run_cli(main)
