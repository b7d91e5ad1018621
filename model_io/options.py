"""The options that choose a model, alike in sample.py, evaluate.py and serve.py: which model,
where, in which numbers."""

import argparse
import sys
from pathlib import Path

import torch

from model_io.adapters import language_folder
from model_io.devices import check_torch, chosen_device, default_dtype
from model_io.graphs import launch_singly
from model_io.load import load_qilin
from model_io.lowbit import choose_ways
from model_io.tokens import Tokenizer
from qilin_min import Qilin

DEFAULT_MODEL = "out/stage2"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model and the other options that open_model takes, in a group of their own."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        default=None,
        metavar="DIR",
        help="folder of a whole model: a train.py --out folder, llava-hf, original LLaVA or Qilin, "
        "or of a peft adapter of one (default out/stage2)",
    )
    add(
        "--base",
        default=None,
        metavar="DIR",
        help="where --model is an adapter: the model or LLaMA folder that it is merged into "
        "(default: the one that it names, looked for beside it, here and in weights/)",
    )
    add("--llm", default=None, metavar="DIR", help="LLaMA folder, in place of the one in --model")
    add("--vision", default=None, metavar="DIR", help="CLIP folder, likewise")
    add("--projector", default=None, metavar="FILE", help="projector file, likewise")
    add("--device", default=None, help="cuda, mps or cpu (default: the first there is)")
    add(
        "--dtype",
        default=None,
        choices=("float32", "bfloat16", "float16"),
        help="default bfloat16 on cuda (float16 before Ampere), float16 on mps; on a CPU bfloat16 "
        "where that multiplies well faster than float32, which is measured, else float32",
    )
    add(
        "--quantize",
        default=None,
        choices=("int8", "int4"),
        help="keep the linear layers of the language model's blocks in 8 or 4 bits (tower, "
        "projector, embeddings and head as they are): a quarter or an eighth of float32's memory; "
        "int8 also writes faster on a CPU",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the language model: faster on CUDA after a slow first answer; needs a "
        "C++ compiler",
    )
    add(
        "--eager",
        action="store_true",
        help="on CUDA: launch each token's kernels one by one, not as one captured CUDA graph, and "
        "widen int8 and int4 instead of looking for the fastest kernel at the start",
    )


def chosen_model(model: str | None, llm: str | None, vision: str | None) -> str | None:
    """--model as given; where it is not, the folder that train.py leaves, unless parts are given.

    FileNotFoundError where that folder is needed and not there.
    """
    if model is not None or (llm and vision):
        return model
    if not Path(DEFAULT_MODEL).exists():
        raise FileNotFoundError(
            "no model in out/stage2: train one (bash demo.sh shows how), or give --model DIR"
        )
    return DEFAULT_MODEL


def open_model(
    model: str | None,
    *,
    llm: str | None,
    vision: str | None,
    projector: str | None,
    base: str | None = None,
    device: str | None,
    dtype: str | None,
    quantize: str | None,
    is_compiled: bool = False,
    is_eager: bool = False,
) -> tuple[Qilin, Tokenizer, str]:
    """(model, tokenizer, device) as the options of the same names say.

    ValueError or FileNotFoundError says what to do.
    """
    model = chosen_model(model, llm, vision)
    if model is None and projector is None:
        raise ValueError(
            "--llm and --vision need the projector between them: give --projector FILE "
            "(or fresh: untrained, its answers mean nothing)"
        )
    check_torch()
    device = chosen_device(device)
    line = None
    if dtype is None:
        dtype, line = default_dtype(device)
    qilin = load_qilin(
        model,
        llm=llm,
        vision=vision,
        projector=projector,
        base=base,
        dtype=getattr(torch, dtype),
        device=device,
        quantize=quantize,
    )
    if line is not None:
        print(line, file=sys.stderr)
    if is_compiled:
        # in place, so that names stay
        qilin.model.compile(dynamic=True)
    if is_eager:
        launch_singly(qilin)
    else:
        ways = choose_ways(qilin)
        if ways is not None:
            print(f"{quantize}, one token at a time: {ways}", file=sys.stderr)
    return qilin, Tokenizer(language_folder(model, llm, base)), device
