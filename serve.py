"""A page in the browser and an OpenAI-compatible endpoint for one model, on this machine alone unless told otherwise.

    python serve.py                                              the model that train.py left in out/stage2, on http://127.0.0.1:8000
    python serve.py --model DIR --port 8080 --quantize int8      any folder: ours, llava-hf; another port
    QILIN_API_KEY=secret python serve.py --host 0.0.0.0          for the whole network: with a key, and behind something that speaks https

The page: drop pictures, ask, read the answer while it is written. For programs (pip install openai):

    picture = "data:image/png;base64," + base64.b64encode(open("image.png", "rb").read()).decode()
    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="qilin", messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "图中有什么异常？"}]}])

Honoured: messages, stream, stream_options, temperature (default 0: the likeliest word each time), top_p, top_k, repetition_penalty, max_tokens, stop, seed.
Any model name is accepted. A system message is put in front of the first question, pictures in front of the question that they came with. All text is literal:
a typed <image> or </s> stays text. What could not be honoured (tools, logprobs, n > 1, JSON mode ...) is refused, and so are pictures by http: nothing is fetched.
A prompt beyond the model's positions is refused, nothing is cut; an answer that reaches them ends with finish_reason "length".
One answer is written at a time, the others wait in order; who leaves gives up the place. Nobody's questions or pictures are logged or kept.
Needs two packages more: pip install fastapi uvicorn. Research code: an answer is no medical advice.
"""

import argparse
import asyncio
import base64
import hashlib
import hmac
import io
import ipaddress
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from common.files import check_ranges, one_line, run_cli
from model_io.options import add_model_options, chosen_model, open_model
from model_io.pixels import is_dicom, open_image, preprocess_image
from model_io.tokens import TEMPLATES, StreamedAnswer, encode_prompt

try:
    import uvicorn
    from fastapi import Depends, FastAPI, HTTPException, Request
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
    from starlette.exceptions import HTTPException as AnyHTTPException
    from starlette.requests import ClientDisconnect
except ImportError:
    FastAPI = None  # main() says what to install

BODY_SECONDS = 120  # a request's body must have come by then
PICTURE_FORMATS = (
    "PNG",
    "JPEG",
    "TIFF",
    "WEBP",
    "BMP",
    "GIF",
    "PPM",
    "JPEG2000",
)  # and DICOM. Not all that Pillow knows: for EPS it would start Ghostscript
CHARS_PER_TOKEN = (
    64  # no token is longer: so much text need not be tokenised to know that it is too long
)


# --- 1. a request ---------------------------------------------------------------------------------------------------
# in: the JSON that a client sent, of which nothing is believed; out: a conversation, its pictures, options; or a refusal

# values that change nothing; any other is refused, because to ignore it would answer something else than was asked
NEUTRAL = {
    "n": [1],
    "best_of": [1],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "logprobs": [False],
    "top_logprobs": [0],
    "logit_bias": [{}],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "min_p": [0],
    "stream": [False, True],
}


def refusal(status, message, code=None, param=None):
    """An exception that becomes OpenAI's error object. No line breaks, nothing that UTF-8 cannot carry."""
    kind = {401: "authentication_error", 403: "permission_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    message = " ".join(message.encode("utf-8", "replace").decode().split())
    headers = {
        503: {"Retry-After": "5"},
        413: {"Connection": "close"},
        408: {"Connection": "close"},
    }.get(status)  # close: the rest of a body is not waited for
    return HTTPException(
        status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers
    )


async def read_body(request, limit):
    """The JSON object of a request. Its bytes are counted as they come: Content-Length may lie. What is too large is read on for a while
    without being kept, because a client that still sends does not hear an answer."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size <= limit:
                    body += piece
                elif size > 4 * limit:
                    break
        if size > limit:
            raise refusal(
                413,
                f"the request is larger than {limit / 2**20:.3g} MB (--max-body-mb)",
                "request_too_large",
            )
        body = json.loads(body)
    except TimeoutError:
        raise refusal(
            408, f"the request did not come whole within {BODY_SECONDS} seconds"
        ) from None
    except ClientDisconnect:
        raise refusal(400, "the request was broken off") from None
    except (ValueError, RecursionError):
        raise refusal(400, "the request is no JSON") from None
    if not isinstance(body, dict):
        raise refusal(400, "the request is no JSON object")
    return body


def read_content(message, where):
    """(text, URLs of pictures) of one message, whose content is a text or a list of parts."""
    content, texts, urls = message.get("content"), [], []
    for part in (
        [{"type": "text", "text": content}]
        if isinstance(content, str)
        else content
        if isinstance(content, list)
        else [None]
    ):
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get(kind) if kind in ("text", "image_url") else None
        value = value.get("url") if kind == "image_url" and isinstance(value, dict) else value
        if not isinstance(value, str):
            raise refusal(
                400,
                f"{where}.content must be a text, or a list of parts {{type: text, text}} and {{type: image_url, image_url: {{url}}}}",
                param="messages",
            )
        (texts if kind == "text" else urls).append(value)
    return "\n".join(texts), urls


def read_messages(messages):
    """(conversation, number of pictures in front of each question, URLs of the pictures) of OpenAI's messages."""
    system, conversation, n_images, urls = [], [], [], []
    for i, message in enumerate(messages if isinstance(messages, list) else []):
        where, role = f"messages[{i}]", message.get("role") if isinstance(message, dict) else None
        expected = ("user", "assistant")[len(conversation) % 2]
        if role != expected and not (role in ("system", "developer") and not conversation):
            raise refusal(
                400,
                f"{where}.role must be {expected}: system first, then user and assistant by turns",
                param="messages",
            )
        text, found = read_content(message, where)
        if found and role != "user":
            raise refusal(
                400, f"{where}: only the user's messages may hold pictures", param="messages"
            )
        if role in ("system", "developer"):
            system.append(text)
            continue
        if not text.strip() and not found:
            raise refusal(400, f"{where} is empty", param="messages")
        conversation.append({"from": "human" if role == "user" else "gpt", "value": text})
        urls += found
        if role == "user":
            n_images.append(len(found))
    if len(conversation) % 2 == 0:
        raise refusal(
            400, "messages must be a list that ends with a user's message", param="messages"
        )
    conversation[0]["value"] = "\n".join([*filter(str.strip, system), conversation[0]["value"]])
    return conversation, n_images, urls


def read_options(body, max_new_tokens):
    """Keywords for StreamedAnswer."""

    def number(name, default, low, high, kind=float):
        value = body.get(name)
        if value is None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
            or kind(value) != value
        ):
            raise refusal(
                400,
                f"{name} must be a {'whole ' * (kind is int)}number from {low} to {high}",
                param=name,
            )
        return kind(value)

    for name, values in NEUTRAL.items():
        if body.get(name) is not None and body[name] not in values:
            raise refusal(
                400, f"{name}: this value is not supported here", "unsupported_parameter", name
            )
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list)
        or len(stop) > 16
        or not all(isinstance(s, str) and 0 < len(s) <= 200 for s in stop)
    ):
        raise refusal(
            400,
            "stop must be a text or a list of at most 16, each of 1 to 200 characters",
            param="stop",
        )
    temperature = number("temperature", 0.0, 0, 2)
    return dict(
        max_new_tokens=number(
            "max_completion_tokens",
            number("max_tokens", max_new_tokens, 1, 10**9, int),
            1,
            10**9,
            int,
        ),
        temperature=temperature
        if temperature >= 0.01
        else 0.0,  # logits divided by less leave the range of float32
        top_p=number("top_p", 1.0, 1e-6, 1),
        top_k=max(number("top_k", 0, -1, 10**9, int), 0),  # -1: vLLM's word for all
        repetition_penalty=number("repetition_penalty", 1.0, 0.01, 100),
        seed=number("seed", None, -(2**63), 2**63 - 1, int),
        stop=stop,
    )


def read_picture(url, name):
    """A PIL image of a data URL. ValueError says what is wrong with the picture called `name`."""
    head, _, data = url.partition(",")
    if not head[:5].lower() == "data:":
        raise ValueError(
            f"{name}: its URL must be a data URL (data:image/png;base64,...); nothing is fetched from elsewhere"
        )
    if not head.lower().endswith(";base64"):
        raise ValueError(f"{name}: its data URL must be in base64")
    try:
        file = io.BytesIO(base64.b64decode("".join(data.split()), validate=True))
    except ValueError:
        raise ValueError(f"{name}: its base64 is damaged") from None
    if not file.getbuffer().nbytes:
        raise ValueError(f"{name} is empty (0 bytes)")
    try:
        if not is_dicom(file):
            with warnings.catch_warnings(
                action="ignore"
            ):  # Pillow's own about size: open_image refuses
                Image.open(file, formats=PICTURE_FORMATS)  # reads the header only
            file.seek(0)
        image = open_image(file)
    except Exception as error:  # the decoders raise many kinds for a damaged file
        said = re.sub(
            r" ?<_io\.BytesIO[^>]*>|^the picture: the picture does not decode ", "", one_line(error)
        ).strip("()")
        raise ValueError(f"{name} does not decode ({said})") from None
    image.filename = name  # for the errors of preprocess_image
    return image


def prepare(model, tokenizer, template, conversation, n_images, urls):
    """(prompt, pixels (M, 3, size, size) or None) of what read_messages gave. Pictures are decoded last: only when they fit."""
    limit, n, config = (
        model.config.text.max_position_embeddings,
        model.config.n_image_tokens,
        model.config,
    )
    n_chars = sum(len(turn["value"]) for turn in conversation)
    fits = len(urls) * n < limit and n_chars <= CHARS_PER_TOKEN * limit
    try:
        prompt = encode_prompt(conversation, tokenizer, n, template, n_images) if fits else []
        if not fits or len(prompt) >= limit:
            length = (
                f"{len(prompt)} tokens"
                if fits
                else f"{len(urls)} pictures of {n} tokens each and {n_chars} characters"
            )
            raise refusal(
                400,
                f"the model's positions end at {limit}, the messages take {length}: fewer pictures, or shorter texts",
                "context_length_exceeded",
                "messages",
            )
        names = [f"picture {k + 1}" if len(urls) > 1 else "the picture" for k in range(len(urls))]
        pixels = [
            preprocess_image(read_picture(url, name), config.vision.image_size, config.image_mode)
            for url, name in zip(urls, names)
        ]
        return prompt, torch.stack(pixels) if pixels else None  # (M, 3, size, size)
    except ValueError as error:
        raise refusal(400, str(error), param="messages") from None


# --- 2. the application ---------------------------------------------------------------------------------------------
# in: HTTP requests; out: the page, JSON, or a stream of events. The event loop only waits: one thread decodes pictures, one writes answers, token by token


async def check_caller(request: "Request"):
    """Refuse what a foreign web site could make a browser send: a name that was pointed at this machine (DNS rebinding), a form, another site's script."""
    host, hosts = request.headers.get("host", "").lower(), request.app.state.hosts
    if hosts and (host if host.endswith("]") else host.rpartition(":")[0] or host) not in hosts:
        raise refusal(
            403,
            "this server is for this machine alone: ask for localhost or 127.0.0.1, or start it with --host",
        )
    if request.method == "POST":
        origin = request.headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host:
            raise refusal(403, "requests from other web sites are refused")
        if (
            request.headers.get("content-type", "").partition(";")[0].strip().lower()
            != "application/json"
        ):
            raise refusal(415, "the Content-Type must be application/json")


async def check_key(request: "Request"):
    key, sent = request.app.state.api_key, request.headers.get("authorization", "")
    if key and not hmac.compare_digest(sent.encode("utf-8", "replace"), f"Bearer {key}".encode()):
        raise refusal(401, "the API key is missing or wrong", "invalid_api_key")


def build_app(model, tokenizer, args, hosts):
    """(FastAPI application, jobs: the requests that are answered or wait, in their order). hosts: the names it may be called by; None: any."""
    silent = dict.fromkeys(
        ("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False
    )  # what is asked is reported to nobody, whatever the environment says
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        telemetry=silent,
        dependencies=[Depends(check_caller)],
    )
    app.state.api_key, app.state.hosts = args.api_key, hosts
    name = Path(args.model or args.llm).resolve().name
    jobs, turn, reader, writer = {}, asyncio.Lock(), ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    async def write(out, options, *question):
        """One request from its pictures to the last word. out gets (answer, prompt length) when they are good, then texts."""
        loop = asyncio.get_running_loop()
        prompt, pixels = await loop.run_in_executor(
            reader, prepare, model, tokenizer, args.template, *question
        )
        answer = StreamedAnswer(model, tokenizer, prompt, pixels, **options)
        out.put_nowait((answer, len(prompt)))
        try:
            async with turn:  # first come, first served
                while (
                    text := await loop.run_in_executor(writer, next, iter(answer), None)
                ) is not None:
                    out.put_nowait(text)
        finally:
            answer.interrupted = True  # when cancelled: the thread is still at a token

    async def watch(request, job):
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    def failure(job):
        """What to tell when a job ended early; None when it did not."""
        if job.cancelled():
            return refusal(503, "the server is stopping")
        error = job.exception()
        if error is None or isinstance(error, HTTPException):
            return error
        print(f"serve.py: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return refusal(
            500, f"the model failed ({type(error).__name__}), the server's terminal says more"
        )

    @app.exception_handler(AnyHTTPException)
    async def show_refusal(request, error):
        shown = (
            error
            if isinstance(error.detail, dict)
            else refusal(error.status_code, str(error.detail))
        )
        return JSONResponse(shown.detail, error.status_code, error.headers)

    @app.exception_handler(Exception)  # a fault of ours; uvicorn prints it
    async def show_fault(request, error):
        return JSONResponse(refusal(500, "the server failed, its terminal says more").detail, 500)

    @app.get("/")
    async def page():
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    @app.get("/health")
    async def health():
        return {"status": "ok", "model": name, "jobs": len(jobs)}

    @app.get("/v1/models", dependencies=[Depends(check_key)])
    async def models():
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "qilin-min"}],
        }

    @app.post("/v1/chat/completions", dependencies=[Depends(check_key)])
    async def chat(request: Request):
        body = await read_body(request, args.max_body_mb * 2**20)
        question, options = (
            read_messages(body.get("messages")),
            read_options(body, args.max_new_tokens),
        )
        stream, usage_too = (
            body.get("stream"),
            isinstance(body.get("stream_options"), dict)
            and body["stream_options"].get("include_usage"),
        )
        if len(jobs) > args.queue:
            raise refusal(
                503, f"{args.queue} questions wait already: try again later", "queue_full"
            )
        out = asyncio.Queue()
        job = asyncio.create_task(write(out, options, *question))
        job.add_done_callback(lambda job: (jobs.pop(job), out.put_nowait(None)))  # None: no more
        jobs[job] = asyncio.create_task(watch(request, job))
        if (began := await out.get()) is None:
            raise failure(job)
        answer, n_prompt = began
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if stream else "chat.completion",
            "created": int(time.time()),
            "model": name,
        }

        def usage():
            return {
                "prompt_tokens": n_prompt,
                "completion_tokens": answer.n_new,
                "total_tokens": n_prompt + answer.n_new,
            }

        def event(delta, finish_reason=None):
            return f"data: {json.dumps(head | {'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish_reason}]})}\n\n"

        async def events():
            yield event({"role": "assistant", "content": ""})
            while True:
                if job in jobs:
                    yield f": queue {list(jobs).index(job)}\n\n"  # a comment to all but our page: how many are before this one
                try:
                    while (text := await asyncio.wait_for(out.get(), 1)) is not None:
                        if text:
                            yield event({"content": text})
                    break
                except TimeoutError:
                    continue
            if error := failure(job):
                yield f"data: {json.dumps(error.detail)}\n\n"
                return
            yield event({}, answer.finish_reason)
            if usage_too:
                yield f"data: {json.dumps(head | {'choices': [], 'usage': usage()})}\n\n"
            yield "data: [DONE]\n\n"

        if stream:
            return StreamingResponse(
                events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        texts = []
        while (text := await out.get()) is not None:
            texts.append(text)
        if error := failure(job):
            raise error
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(texts)},
            "finish_reason": answer.finish_reason,
            "logprobs": None,
        }
        return JSONResponse(head | {"choices": [choice], "usage": usage()})

    return app, jobs


# --- 3. the page ----------------------------------------------------------------------------------------------------
# one file without any outside resource; whatever comes from a person or the model is set as text, never as HTML

PAGE = (Path(__file__).parent / "serving/page.html").read_text(encoding="utf-8")
SCRIPT_HASH = base64.b64encode(
    hashlib.sha256(re.search("<script>(.*)</script>", PAGE, re.DOTALL)[1].encode()).digest()
).decode()
PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{SCRIPT_HASH}'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


# --- 4. command line ------------------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0: every network this machine is in (default %(default)s)",
    )
    add("--port", type=int, default=8000, help="0: any that is free (default %(default)s)")
    add(
        "--api-key",
        default=os.environ.get("QILIN_API_KEY", ""),
        metavar="KEY",
        help="clients must send it as a bearer token; the page asks for it (default $QILIN_API_KEY, which other users of the machine cannot see)",
    )
    add("--queue", type=int, default=16, help="so many questions may wait (default %(default)s)")
    add(
        "--max-body-mb",
        type=float,
        default=32,
        help="largest request, pictures in base64 included (default %(default)s)",
    )
    add(
        "--max-new-tokens",
        type=int,
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
    args = parser.parse_args()
    check_ranges(
        args,
        port=(0, 65535),
        queue=(0, 10**4),
        max_body_mb=(0.001, 1024),
        max_new_tokens=(1, 10**6),
    )
    args.api_key = args.api_key.strip()
    if not args.api_key.isascii() or not args.api_key.isprintable():
        raise ValueError("the API key holds characters that no header can carry")
    return args


def open_socket(host, port):
    """A listening socket. ValueError when the address cannot be had: before the model is loaded, not after."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"cannot listen at {host}, port {port} ({getattr(error, 'strerror', None) or 'no such name'}): give another --port or --host"
        ) from None


async def serve(app, jobs, sock, greeting):
    """Until Ctrl-C or SIGTERM, which end every answer at its next token."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=500,
            timeout_graceful_shutdown=3,
        )
    )

    async def watch():
        while not server.should_exit:
            await asyncio.sleep(0.1)
            if server.started and greeting:
                print(greeting.pop(), file=sys.stderr, flush=True)
        for job in list(jobs):
            job.cancel()
        await asyncio.sleep(0.5)  # their clients are told
        for connection in list(
            server.server_state.connections
        ):  # who is still sending a request is not waited for
            connection.transport.close()

    watching = asyncio.create_task(watch())
    await server.serve([sock])
    await watching


def main():
    args = parse_args()
    if FastAPI is None:
        raise ValueError("the server needs two packages more: pip install fastapi uvicorn")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sock = open_socket(args.host, args.port)
    address, port = sock.getsockname()[:2]
    local = ipaddress.ip_address(address).is_loopback
    if not local:
        without = "" if args.api_key else ", without a key (set $QILIN_API_KEY)"
        print(
            f"serve.py: warning: whoever reaches {address} can ask{without}; what is sent can be read on its way",
            file=sys.stderr,
        )
    args.model = chosen_model(args.model, args.llm, args.vision)
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
    name = f"[{address}]" if ":" in address else address  # in a URL
    app, jobs = build_app(
        model,
        tokenizer,
        args,
        {"localhost", "127.0.0.1", "[::1]", name, args.host.lower()} if local else None,
    )
    asyncio.run(
        serve(
            app,
            jobs,
            sock,
            [
                f"http://{name}:{port} answers with a {model.config.text.num_hidden_layers}-layer model on {device}; "
                "Ctrl-C ends it. Research code: no medical advice."
            ],
        )
    )


if __name__ == "__main__":
    run_cli(main)
