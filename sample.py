"""Ask Qilin-Med-VL about a picture: one question, a chat, and where it looked.

    python sample.py image.png "图中有什么异常？"                        the model that train.py left in out/stage2
    python sample.py image.png "问题" --model DIR                        any folder: ours, llava-hf, original LLaVA or Qilin
    python sample.py a.png b.dcm "两张图有何不同？"                       several pictures: PNG, JPEG, TIFF, WebP, DICOM …, 8 or 16 bits
    python sample.py "什么是肺结节？"                                     text only
    python sample.py --chat image.png                                     several turns: /image FILE… takes other pictures, /reset forgets what was said
    python sample.py image.png "问题" --heatmap out.png                  beside the answer, a picture of what it attended to

The answer streams to stdout, everything else goes to stderr. Before a question that begins with a dash put `--`, after all options.
Ctrl-C stops an answer. Too long a prompt is refused, a picture is never cut. Research code: an answer is no medical advice.
"""

import argparse
import os
import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.files import OUT_OF_MEMORY, USER_ERRORS, check_ranges, one_line, run_cli
from model_io.options import add_model_options, open_model
from model_io.pixels import open_image, preprocess_image
from model_io.tokens import TEMPLATES, StreamedAnswer, build_prompt, encode_prompt
from qilin_min import IMAGE_TOKEN_INDEX, KVCache, apply_rotary_pos_emb

# --- 1. options -----------------------------------------------------------------------------------------------------


def parse_args():
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
        help="ask on and on about the same pictures; the keys and values of what was said are kept, no picture is computed twice",
    )
    add(
        "--template",
        default="v1",
        choices=TEMPLATES,
        help="the one it was trained with (default %(default)s)",
    )
    add("--max-new-tokens", type=int, default=512, help="(default %(default)s)")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0: the likeliest word each time; 0.2 to 1: more varied (default %(default)s)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="draw only from the likeliest words that make up this share (default %(default)s)",
    )
    add(
        "--top-k",
        type=int,
        default=0,
        help="draw only from the k likeliest words; 0: all (default %(default)s)",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1: less repetition (default %(default)s)",
    )
    add("--seed", type=int, default=None, help="the same seed draws the same answer")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )
    add(
        "--heatmap",
        type=Path,
        default=None,
        metavar="PNG",
        help="draw each picture beside itself under the attention that the answer's tokens paid to its patches",
    )
    add(
        "--heatmap-layers",
        default=None,
        metavar="A-B",
        help="layers whose heads are averaged, counted from 1 (default: the middle third)",
    )
    add_model_options(parser)
    args = parser.parse_intermixed_args()
    check_ranges(
        args,
        max_new_tokens=(1, 10**6),
        temperature=(0, 100),
        top_p=(1e-9, 1),
        top_k=(0, 10**9),
        repetition_penalty=(1e-3, 1e3),
        seed=(0, 2**63 - 1),
    )
    if not all(args.stop):
        raise ValueError("--stop: the text is empty")
    if args.chat and (args.heatmap or args.template != "v1"):
        raise ValueError(
            "--chat goes with template v1 and without --heatmap: ask that one question by itself"
        )
    if not args.chat:
        check_question(args.words)
    if args.heatmap and len(args.words) < 2:
        raise ValueError("--heatmap needs a picture")
    if args.heatmap and (args.heatmap.suffix.lower() != ".png" or not args.heatmap.parent.is_dir()):
        raise ValueError(f"--heatmap {args.heatmap}: must end in .png, in a folder that is there")
    check_pictures(args.words if args.chat else args.words[:-1])
    return args


def check_question(words):
    """ValueError or FileNotFoundError unless the last word is a question."""
    if not words or not words[-1].strip():
        raise ValueError(
            "the question is empty"
            if words
            else 'what is the question? (python sample.py image.png "…"; --help shows more)'
        )
    if os.path.isfile(words[-1]):
        raise ValueError(
            f"the last word must be the question, but {words[-1]!r} is a file (--chat for several questions)"
        )
    if " " not in words[-1] and Path(words[-1]).suffix.lower() in {
        *Image.registered_extensions(),
        ".dcm",
    }:
        raise FileNotFoundError(
            f"no such picture: {words[-1]} (and the last word must be the question)"
        )


def check_pictures(paths):
    """ValueError or FileNotFoundError for what is no file, before a model is loaded."""
    for path in paths:
        if "://" in path:
            raise ValueError(f"{path}: only files, no URLs; download the picture first")
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such picture: {path}")


def read_pictures(paths, config):
    """float32 (M, 3, H, W) of picture files as the model takes them, or None of none."""
    return (
        torch.stack(
            [preprocess_image(path, config.vision.image_size, config.image_mode) for path in paths]
        )
        if paths
        else None
    )


# --- 2. chat --------------------------------------------------------------------------------------------------------


class Chat:
    """A dialog whose keys and values are kept, so that a turn costs its own words only."""

    def __init__(self, model, tokenizer, pixels):
        self.model, self.tokenizer, self.limit = (
            model,
            tokenizer,
            model.config.text.max_position_embeddings,
        )
        self.look_at(pixels)

    def look_at(self, pixels):
        """Begin anew with other pictures (M, 3, H, W), or None."""
        self.pixels, self.said = pixels, []  # said: ids of the dialog so far
        self.cache, self.held = (
            KVCache(self.model.config.text.num_hidden_layers, self.limit),
            [],
        )  # held: ids whose keys and values are in the cache

    def reset(self):
        """Forget what was said, but not the pictures."""
        self.said = []

    def ask(self, question, **options):
        """Yield the answer's text. An interrupted answer stays in the dialog as far as it came. ValueError leaves everything as it was."""
        if self.said:  # what follows </s> is encoded by itself, exactly as encode_prompt would encode the whole dialog
            human, gpt = {"from": "human", "value": question}, {"from": "gpt", "value": "-"}
            prompt = (
                self.said
                + [self.tokenizer.eos_id]
                + self.tokenizer.encode(build_prompt([human, gpt, human], n_images=0)[-1].content)
            )
        else:
            prompt = encode_prompt(
                [{"from": "human", "value": question}],
                self.tokenizer,
                self.model.config.n_image_tokens,
                n_images=0 if self.pixels is None else len(self.pixels),
            )
        check_length(prompt, self.limit, "the dialog", "/reset, or a shorter question")
        n = next(
            (i for i, (a, b) in enumerate(zip(self.held, prompt)) if a != b),
            min(len(self.held), len(prompt) - 1),
        )
        pixels = self.pixels if IMAGE_TOKEN_INDEX in prompt[n:] else None
        if pixels is not None:
            n = 0  # not all pictures were computed: an answer was interrupted before its first word
        if self.held:
            self.cache.truncate(torch.tensor([n], device=self.cache.lengths.device))
        self.held, answer = (
            prompt[:n],
            StreamedAnswer(self.model, self.tokenizer, prompt, pixels, cache=self.cache, **options),
        )
        try:
            for text in answer:
                yield text
        finally:
            if self.cache.lengths is not None:
                self.held = (prompt + answer.ids)[: int(self.cache.lengths)]
            if answer.ids:
                self.said = prompt + answer.ids
            self.answer = answer


def check_length(prompt, limit, what, remedy):
    if len(prompt) >= limit:
        raise ValueError(
            f"{what} takes {len(prompt)} tokens, the model's positions end at {limit}: {remedy}"
        )


def chat(model, tokenizer, pixels, options):
    """Read questions from the terminal, or lines from a pipe, until the end or Ctrl-C at the prompt."""
    talk, is_person = Chat(model, tokenizer, pixels), sys.stdin.isatty()
    if is_person:
        try:
            import readline  # noqa: F401  line editing and history, of this run only: questions about patients belong in no file
        except ImportError:
            pass  # Windows' terminal edits by itself
        print(
            "/image FILE… other pictures   /reset forget what was said   /quit or Ctrl-D end   Ctrl-C stops an answer",
            file=sys.stderr,
        )
    while True:
        try:
            line = input("> " if is_person else "").strip()
        except EOFError:
            return
        try:
            command, rest = (*line.split(None, 1), "", "")[:2]
            if command in ("/quit", "/exit"):
                return
            elif command == "/reset":
                talk.reset()
            elif command == "/image":
                names = shlex.split(rest)
                check_pictures(names)
                talk.look_at(read_pictures(names, model.config))
                print(f"{len(names)} pictures, a new dialog", file=sys.stderr)
            elif re.fullmatch("/[a-z]+", command):
                raise ValueError(f"{command}: there are /image FILE…, /reset and /quit")
            elif line:
                print_answer(talk.ask(line, **options))
                if end := unfinished(talk.answer, len(talk.said), talk.limit):
                    print(end, file=sys.stderr)
        except KeyboardInterrupt:
            if not is_person:
                raise
            print(" (stopped)", file=sys.stderr)
        except USER_ERRORS as error:
            print(one_line(error), file=sys.stderr)
        except torch.OutOfMemoryError:
            print(OUT_OF_MEMORY, file=sys.stderr)


def unfinished(answer, n_tokens, limit):
    """Why an answer may have no end, or ""."""
    if answer.finish_reason != "length":
        return ""
    return f" ({'the last position of the model' if n_tokens >= limit else '--max-new-tokens'}: the answer may be unfinished)"


def print_answer(texts):
    try:
        for text in texts:
            print(text, end="", flush=True)
    finally:
        print(flush=True)


# --- 3. where the answer looked -------------------------------------------------------------------------------------

COLOURS = np.array(
    [[60, 0, 110], [190, 30, 90], [250, 110, 30], [255, 235, 110]], dtype=np.float32
)  # from little attention to much


@torch.no_grad()
def answer_attention(model, ids, n_prompt, pixel_values, layers):
    """float32 (A, T): what each of the A tokens after the first n_prompt of `ids` (a list of T) paid attention to when it was chosen, each row of sum 1.

    The softmax is computed here from the queries and keys of one pass over prompt and answer, and averaged over all heads of `layers` (indices).
    Row i is the attention of the position before token n_prompt + i, the one whose logits chose it.
    """
    chosen_at = slice(n_prompt - 1, len(ids) - 1)
    attentions = []

    def look(attention, inputs):
        x, rope = inputs[:2]
        q, k = (
            proj(x)[0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1).float()
            for proj in (attention.q_proj, attention.k_proj)
        )  # (H or H_kv, T, D)
        q, k = (apply_rotary_pos_emb(t, *(r[0].float() for r in rope)) for t in (q, k))
        k = k.repeat_interleave(len(q) // len(k), dim=0)  # (H, T, D)
        scores = q[:, chosen_at] @ k.transpose(1, 2) / attention.head_dim**0.5  # (H, A, T)
        future = (
            torch.arange(len(ids), device=x.device)
            > torch.arange(n_prompt - 1, len(ids) - 1, device=x.device)[:, None]
        )  # (A, T)
        attentions.append(scores.masked_fill(future, -torch.inf).softmax(-1).mean(0))  # (A, T)

    hooks = [model.model.layers[i].self_attn.register_forward_pre_hook(look) for i in layers]
    device = next(model.parameters()).device
    try:
        with torch.compiler.set_stance("force_eager"):
            model(
                torch.tensor([ids], device=device),
                None if pixel_values is None else pixel_values.to(device),
            )
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(attentions).mean(0).cpu()  # (A, T)


def layers_of(text, n_layers):
    """The layer indices of "A-B", counted from 1; None: the middle third, where words have met the picture and do not yet prepare the next word."""
    if text is None:
        return range(n_layers // 3, max(n_layers // 3 + 1, n_layers - n_layers // 3))
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= n_layers:
        raise ValueError(f"--heatmap-layers {text}: must be like 3-5, within 1 to {n_layers}")
    return range(first - 1, last)


def draw_heat(image, heat, mode):
    """A PIL image: the picture, and beside it the same under `heat` (h, w) of its patches, mapped back through preprocess_image's `mode` of squaring."""
    scale = min(max(512, *image.size), 1024) / max(image.size)
    image = (
        image.resize([max(1, round(n * scale)) for n in image.size], Image.Resampling.BICUBIC)
        if scale != 1
        else image
    )
    (width, height), side = image.size, (max if mode == "pad" else min)(image.size)
    square = Image.fromarray(np.float32(heat / max(heat.max(), 1e-12))).resize(
        (side, side), Image.Resampling.BILINEAR
    )
    whole = Image.new("F", image.size)
    whole.paste(square, ((width - side) // 2, (height - side) // 2))
    strength = np.asarray(whole)[..., None]  # (H, W, 1), 0 to 1
    place = strength * (len(COLOURS) - 1)
    low = np.minimum(place.astype(int), len(COLOURS) - 2)[..., 0]
    colour = COLOURS[low] + (place - low[..., None]) * (COLOURS[low + 1] - COLOURS[low])
    pixels, alpha = np.asarray(image, dtype=np.float32), 0.75 * np.sqrt(strength)
    pair = Image.new("RGB", (2 * width + 8, height), (255, 255, 255))
    pair.paste(image, (0, 0))
    pair.paste(
        Image.fromarray(np.uint8(np.rint(pixels * (1 - alpha) + colour * alpha))), (width + 8, 0)
    )
    return pair


def heatmap(model, prompt, answer, paths, pixels, layers, out):
    """Write the heat of all pictures, one under the other, and say how much of the attention went to them."""
    if not answer:
        raise ValueError("no heatmap: the answer has no tokens")
    ids = prompt + answer
    attention = answer_attention(model, ids, len(prompt), pixels, layers).mean(0)  # (T,)
    places = torch.tensor(ids) == IMAGE_TOKEN_INDEX
    side = model.config.vision.image_size // model.config.vision.patch_size
    heats = attention[places].view(len(paths), side, side).numpy()
    pairs = [
        draw_heat(open_image(path), heat, model.config.image_mode)
        for path, heat in zip(paths, heats)
    ]
    sheet = Image.new(
        "RGB", (max(p.width for p in pairs), sum(p.height + 8 for p in pairs) - 8), (255, 255, 255)
    )
    top = 0
    for pair in pairs:
        sheet.paste(pair, (0, top))
        top += pair.height + 8
    partial = out.with_name(out.name + ".partial")
    sheet.save(partial, "PNG")
    os.replace(partial, out)
    print(
        f"{out}: {float(attention[places].sum()):.1%} of the attention went to the picture, whose patches are {float(places.float().mean()):.1%} of the tokens "
        f"(mean of all heads, layers {layers[0] + 1} to {layers[-1] + 1}, {len(answer)} tokens)",
        file=sys.stderr,
    )


# --- 4. main --------------------------------------------------------------------------------------------------------


def main():
    args = parse_args()
    options = {
        name: getattr(args, name)
        for name in (
            "max_new_tokens",
            "temperature",
            "top_p",
            "top_k",
            "repetition_penalty",
            "seed",
            "stop",
        )
    }
    paths = args.words if args.chat else args.words[:-1]
    tic = time.perf_counter()
    model, tokenizer, device = open_model(
        args.model,
        llm=args.llm,
        vision=args.vision,
        projector=args.projector,
        device=args.device,
        dtype=args.dtype,
        quantize=args.quantize,
        is_compiled=args.compile,
    )
    limit, layers = (
        model.config.text.max_position_embeddings,
        layers_of(args.heatmap_layers, model.config.text.num_hidden_layers),
    )
    pixels = read_pictures(paths, model.config)  # (M, 3, H, W)
    print(
        f"{model.config.text.num_hidden_layers}-layer model loaded on {device} in {time.perf_counter() - tic:.1f} s. Research code: no medical advice.",
        file=sys.stderr,
    )
    if args.template == "plain":
        print("template plain has no place for a question: it is not read", file=sys.stderr)
    if args.chat:
        return chat(model, tokenizer, pixels, options)

    prompt = encode_prompt(
        [{"from": "human", "value": args.words[-1]}],
        tokenizer,
        model.config.n_image_tokens,
        args.template,
        n_images=len(paths),
    )
    check_length(
        prompt,
        limit,
        f"the question with {len(paths)} picture{'s' * (len(paths) > 1)}"
        if paths
        else "the question",
        "fewer pictures, or a shorter question",
    )
    tic, answer = time.perf_counter(), StreamedAnswer(model, tokenizer, prompt, pixels, **options)
    print_answer(answer)
    seconds = time.perf_counter() - tic
    print(
        f"{len(prompt)} tokens read, {answer.n_new} written, {answer.n_new / seconds:.1f} a second{unfinished(answer, len(prompt) + answer.n_new, limit)}",
        file=sys.stderr,
    )
    if args.heatmap:
        heatmap(model, prompt, answer.ids, paths, pixels, layers, args.heatmap)


if __name__ == "__main__":
    run_cli(main)
