"""The options that choose a model: what sample.py, evaluate.py and serve.py ask for alike: which model, where, in which numbers."""

from pathlib import Path

import torch

from common.files import one_line
from model_io.load import load_qilin
from model_io.tokens import Tokenizer


def add_model_flags(parser):
    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--model",
        default=None,
        metavar="DIR",
        help="folder of a whole model: a train.py --out folder, llava-hf, original LLaVA or Qilin (default out/stage2)",
    )
    add("--llm", default=None, metavar="DIR", help="LLaMA folder, in place of the one in --model")
    add("--vision", default=None, metavar="DIR", help="CLIP folder, likewise")
    add("--projector", default=None, metavar="FILE", help="projector file, likewise")
    add("--device", default=None, help="cuda, mps or cpu (default: the first there is)")
    add(
        "--dtype",
        default=None,
        choices=("float32", "bfloat16", "float16"),
        help="default bfloat16 on cuda (float16 before Ampere), float16 on mps, float32 on cpu",
    )
    add(
        "--quantize",
        default=None,
        choices=("int8", "int4"),
        help="keep the linear layers of the language model's blocks in 8 or 4 bits (tower, projector, embeddings and "
        "head as they are): a quarter or an eighth of float32's memory; int8 also writes faster on a CPU",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the language model: faster on CUDA after a slow first answer; needs a C++ compiler",
    )


def model_from_flags(args):
    """(model, tokenizer, device) as add_model_flags' options say. ValueError or FileNotFoundError says what to do."""
    if args.model is None and not (args.llm and args.vision):
        args.model = "out/stage2"
        if not Path(args.model).exists():
            raise FileNotFoundError(
                "no model in out/stage2: train one (bash demo.sh shows how), or give --model DIR"
            )
    if args.model is None and args.projector is None:
        raise ValueError(
            "--llm and --vision need the projector between them: give --projector FILE (or fresh: untrained, its answers mean nothing)"
        )
    device = args.device or (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {device}: not to be had here ({one_line(error)[:100]})"
        ) from None
    kind = torch.device(device).type
    default = {
        "cuda": "bfloat16"
        if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        else "float16",
        "mps": "float16",
    }.get(kind, "float32")
    model = load_qilin(
        args.model,
        llm=args.llm,
        vision=args.vision,
        projector=args.projector,
        dtype=getattr(torch, args.dtype or default),
        device=device,
        quantize=args.quantize,
    )
    if args.compile:
        model.model.compile(dynamic=True)  # in place, so that names stay
    return model, Tokenizer(args.llm or args.model), device
