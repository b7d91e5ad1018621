"""A page in the browser and an OpenAI-compatible endpoint for one model, on this machine alone
unless told otherwise.

    python serve.py
        the model that train.py left in out/stage2, on http://127.0.0.1:8000
    python serve.py --model DIR --port 8080 --quantize int8
        any folder: ours, llava-hf; another port
    QILIN_API_KEY=secret python serve.py --host 0.0.0.0
        for the whole network: with a key, and behind something that speaks https

The page: drop pictures, ask, read the answer while it is written.
For programs (pip install openai):

    raw = open("image.png", "rb").read()
    picture = "data:image/png;base64," + base64.b64encode(raw).decode()
    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="qilin", messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": "图中有什么异常？"}]}])

Honoured: messages, stream, stream_options, temperature (default 0: the likeliest word each time),
top_p, top_k, repetition_penalty, max_tokens, stop, seed. Any model name is accepted. A system
message is put in front of the first question, pictures in front of the question that they came
with. All text is literal: a typed <image> or </s> stays text. What could not be honoured (tools,
logprobs, n > 1, JSON mode ...) is refused, and so are pictures by http: nothing is fetched.
A prompt beyond the model's positions is refused, nothing is cut; an answer that reaches them ends
with finish_reason "length".
One answer is written at a time, the others wait in order; who leaves gives up the place. Nobody's
questions or pictures are logged or kept.
Needs two packages more: pip install fastapi uvicorn. Research code: an answer is no medical advice.
"""

import argparse
import asyncio
import importlib
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path

from common.files import run_cli
from common.options import InRange
from model_io.options import add_model_options, chosen_model, open_model
from model_io.tokens import TEMPLATES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0: every network this machine is in "
        "(default %(default)s)",
    )
    add(
        "--port",
        action=InRange,
        type=int,
        low=0,
        high=65535,
        default=8000,
        help="0: any that is free (default %(default)s)",
    )
    add(
        "--api-key",
        default=os.environ.get("QILIN_API_KEY", ""),
        metavar="KEY",
        help="clients must send it as a bearer token; the page asks for it "
        "(default $QILIN_API_KEY, which other users of the machine cannot see)",
    )
    add(
        "--queue",
        action=InRange,
        type=int,
        low=0,
        high=10**4,
        default=16,
        help="so many questions may wait (default %(default)s)",
    )
    add(
        "--max-body-mb",
        action=InRange,
        type=float,
        low=0.001,
        high=1024,
        default=32,
        help="largest request, pictures in base64 included (default %(default)s)",
    )
    add(
        "--max-new-tokens",
        action=InRange,
        type=int,
        low=1,
        high=10**6,
        default=512,
        help="for requests that name no max_tokens (default %(default)s)",
    )
    add(
        "--template",
        default="v1",
        choices=TEMPLATES,
        help="the one it was trained with (default %(default)s)",
    )
    add_model_options(parser)
    return parser


def clean_key(key: str) -> str:
    """An API key without blanks around it. ValueError when no header could carry it."""
    key = key.strip()
    if not key.isascii() or not key.isprintable():
        raise ValueError("the API key holds characters that no header can carry")
    return key


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. ValueError when the address cannot be had: before the model is loaded,
    not after.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "no such name"
        raise ValueError(
            f"cannot listen at {host}, port {port} ({why}): give another --port or --host"
        ) from None


def main() -> None:
    args = build_parser().parse_args()
    api_key = clean_key(args.api_key)
    try:
        for package in ("fastapi", "uvicorn"):
            importlib.import_module(package)
    except ImportError:
        raise ValueError(
            "the server needs two packages more: pip install fastapi uvicorn"
        ) from None
    # here, since it needs them
    from serving.app import ServerSettings, build_app, serve_app

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sock = open_socket(args.host, args.port)
    address, port = sock.getsockname()[:2]
    # as it stands in a URL
    name = f"[{address}]" if ":" in address else address
    hosts = None
    if ipaddress.ip_address(address).is_loopback:
        hosts = {"localhost", "127.0.0.1", "[::1]", name, args.host.lower()}
    else:
        without = "" if api_key else ", without a key (set $QILIN_API_KEY)"
        print(
            f"serve.py: warning: whoever reaches {address} can ask{without}; "
            "what is sent can be read on its way",
            file=sys.stderr,
        )
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
    folder = chosen_model(args.model, args.llm, args.vision) or args.llm
    settings = ServerSettings(
        name=Path(folder).resolve().name,
        template=args.template,
        api_key=api_key,
        hosts=hosts,
        queue=args.queue,
        max_body=args.max_body_mb * 2**20,
        max_new_tokens=args.max_new_tokens,
    )
    app, jobs = build_app(model, tokenizer, settings)
    n_layers = model.config.text.num_hidden_layers
    greeting = (
        f"http://{name}:{port} answers with a {n_layers}-layer model on {device}; "
        "Ctrl-C ends it. Research code: no medical advice."
    )
    asyncio.run(serve_app(app, jobs, sock, greeting))


if __name__ == "__main__":
    run_cli(main)
