"""Ask Qilin-Med-VL one question about a picture.

    python sample.py image.png "图中有什么异常？"                        the model that train.py left in out/stage2
    python sample.py image.png "问题" --model DIR                        any folder: ours, llava-hf
    python sample.py a.png b.png "两张图有何不同？"                       several pictures
    python sample.py "什么是肺结节？"                                     text only

The answer streams to stdout, everything else goes to stderr. Before a question that begins with a dash put `--`, after all options. Research code: an answer is no medical advice.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from qilin_min import Tokenizer, check_ranges, encode_prompt, generate, load_qilin, one_line, preprocess_image, run_cli


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("words", nargs="+", metavar="image … question", help="picture files, then the question")
    add("--model", default=None, help="folder of a whole model (default out/stage2)")
    add("--llm", default=None, help="LLaMA folder, in place of the one in --model")
    add("--vision", default=None, help="CLIP folder, likewise")
    add("--projector", default=None, help="projector file, likewise")
    add("--template", default="v1", choices=("v1", "plain"), help="the one it was trained with (default %(default)s)")
    add("--max-new-tokens", type=int, default=512, help="(default %(default)s)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest word each time; 0.2 to 1: more varied (default %(default)s)")
    add("--top-p", type=float, default=1.0, help="draw only from the likeliest words that make up this share (default %(default)s)")
    add("--top-k", type=int, default=0, help="draw only from the k likeliest words; 0: all (default %(default)s)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: less repetition (default %(default)s)")
    add("--seed", type=int, default=None, help="the same seed draws the same answer")
    add("--device", default=None, help="cuda, mps or cpu (default: the first there is)")
    add("--dtype", default=None, choices=("float32", "bfloat16", "float16"), help="default bfloat16 on cuda, else float32")
    add("--quantize", default=None, choices=("int8", "int4"), help="keep the language model's blocks in 8 or 4 bits: less memory, not more speed")
    args = parser.parse_intermixed_args()
    check_ranges(args, max_new_tokens=(1, 10**6), temperature=(0, 100), top_p=(1e-9, 1), top_k=(0, 10**9), repetition_penalty=(1e-3, 1e3), seed=(0, 2**63 - 1))
    if args.model is None and not (args.llm and args.vision):
        args.model = "out/stage2"
        if not Path(args.model).exists():
            raise FileNotFoundError("no model in out/stage2: train one (bash demo.sh shows how), or give --model DIR")
    if args.model is None and args.projector is None:
        raise ValueError("--llm and --vision need the projector between them: give --projector FILE (or fresh: untrained, its answers mean nothing)")
    return args


def main():
    args = parse_args()
    *pictures, question = args.words
    if not question.strip():
        raise ValueError("the question is empty")
    if os.path.isfile(question):
        raise ValueError(f"the last word must be the question, but {question!r} is a file")
    if " " not in question and Path(question).suffix.lower() in Image.registered_extensions():
        raise FileNotFoundError(f"no such picture: {question} (and the last word must be the question)")
    for path in pictures:
        if "://" in path:
            raise ValueError(f"{path}: only files, no URLs; download the picture first")
    device = args.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: not to be had here ({one_line(error)[:100]})") from None
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))

    tic = time.perf_counter()
    model = load_qilin(args.model, llm=args.llm, vision=args.vision, projector=args.projector, dtype=dtype, device=device, quantize=args.quantize)
    tokenizer = Tokenizer(args.llm or args.model)
    pixels = torch.stack([preprocess_image(path, model.config.vision.image_size, model.config.image_mode) for path in pictures]) if pictures else None  # (M, 3, H, W)
    conversation = [{"from": "human", "value": question}]
    prompt = encode_prompt(conversation, tokenizer, model.config.n_image_tokens, args.template, n_images=len(pictures))
    if len(prompt) >= model.config.text.max_position_embeddings:
        raise ValueError(f"{len(pictures)} pictures and the question take {len(prompt)} tokens, the model's positions end at "
                         f"{model.config.text.max_position_embeddings}: fewer pictures, or a shorter question")
    print(f"{model.config.text.num_hidden_layers}-layer model loaded on {device} in {time.perf_counter() - tic:.1f} s. Research code: no medical advice.", file=sys.stderr)

    tic, n_new = time.perf_counter(), 0

    def new_ids():
        nonlocal n_new
        for (i,) in generate(model, [prompt], pixels, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
                             top_k=args.top_k, repetition_penalty=args.repetition_penalty, seed=args.seed):
            n_new += 1
            if i not in model.config.end_ids:
                yield i

    for text in tokenizer.decode_stream(new_ids()):
        print(text, end="", flush=True)
    print(flush=True)
    seconds = time.perf_counter() - tic
    print(f"{len(prompt)} tokens read, {n_new} written, {n_new / seconds:.1f} a second", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
