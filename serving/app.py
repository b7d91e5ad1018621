"""The application: HTTP requests -> the page, JSON, or a stream of events.

Needs two packages more: pip install fastapi uvicorn. The event loop only waits: one thread decodes
pictures, one writes answers, token by token.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from common.files import one_line
from model_io.beginnings import Beginnings
from model_io.tokens import StreamedAnswer, Tokenizer
from qilin_min import Qilin
from serving.requests import ChatQuestion, Refusal, prepare_question, read_messages, read_options

# a request's body must have come by then
BODY_SECONDS = 120

# one file without any outside resource; whatever comes from a person or the model is set as text,
# never as HTML
CHAT_PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
CHAT_SCRIPT = CHAT_PAGE.partition("<script>")[2].rpartition("</script>")[0]
SCRIPT_HASH = base64.b64encode(hashlib.sha256(CHAT_SCRIPT.encode()).digest()).decode()
PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        f"default-src 'none'; script-src 'sha256-{SCRIPT_HASH}'; style-src 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
}
# what is asked is reported to nobody, whatever the environment says
TELEMETRY = dict.fromkeys(
    ("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False
)


@dataclass
class ServerSettings:
    """What the server was told."""

    # the model's name, as clients see it
    name: str
    template: str
    # "": none is asked for
    api_key: str
    # the names the server may be called by; None: any
    hosts: set[str] | None
    # so many questions may wait
    queue: int
    # bytes
    max_body: float
    # for requests that name no max_tokens
    max_new_tokens: int


# --- 1. who may ask -------------------------------------------------------------------------------


def is_named(host: str, hosts: set[str]) -> bool:
    """Whether a Host header, with a port or without, names one of hosts."""
    if not host.endswith("]"):
        host = host.rpartition(":")[0] or host
    return host in hosts


async def check_caller(request: Request) -> None:
    """Refuse what a foreign web site could make a browser send: a name that was pointed at this
    machine (DNS rebinding), a form, another site's script.
    """
    host = request.headers.get("host", "").lower()
    hosts = request.app.state.settings.hosts
    if hosts and not is_named(host, hosts):
        raise Refusal(
            403,
            "this server is for this machine alone: ask for localhost or 127.0.0.1, "
            "or start it with --host",
        )
    if request.method != "POST":
        return
    origin = request.headers.get("origin")
    if origin is not None and origin.lower().partition("://")[2] != host:
        raise Refusal(403, "requests from other web sites are refused")
    content_type = request.headers.get("content-type", "").partition(";")[0]
    if content_type.strip().lower() != "application/json":
        raise Refusal(415, "the Content-Type must be application/json")


async def check_key(request: Request) -> None:
    key = request.app.state.settings.api_key
    sent = request.headers.get("authorization", "").encode("utf-8", "replace")
    if key and not hmac.compare_digest(sent, f"Bearer {key}".encode()):
        raise Refusal(401, "the API key is missing or wrong", "invalid_api_key")


async def read_body(request: Request, limit: float) -> dict[str, Any]:
    """The JSON object of a request. Its bytes are counted as they come: Content-Length may lie.
    What is too large is read on for a while without being kept, because a client that still sends
    does not hear an answer.
    """
    raw = bytearray()
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size <= limit:
                    raw += piece
                elif size > 4 * limit:
                    break
        if size > limit:
            raise Refusal(
                413,
                f"the request is larger than {limit / 2**20:.3g} MB (--max-body-mb)",
                "request_too_large",
            )
        body = json.loads(raw)
    except TimeoutError:
        raise Refusal(
            408, f"the request did not come whole within {BODY_SECONDS} seconds"
        ) from None
    except ClientDisconnect:
        raise Refusal(400, "the request was broken off") from None
    except (ValueError, RecursionError):
        raise Refusal(400, "the request is no JSON") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the request is no JSON object")
    return body


# --- 2. one answer at a time ----------------------------------------------------------------------


@dataclass
class Job:
    """One request on its way."""

    task: asyncio.Task
    # what its task gives: (StreamedAnswer, tokens of the prompt) when the pictures are good, then
    # texts, then None: no more
    out: asyncio.Queue


class Jobs:
    """The requests that are answered or wait, in their order."""

    def __init__(self, model: Qilin, tokenizer: Tokenizer, template: str):
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        # the pictures asked about last; used by one answer at a time
        self.beginnings = Beginnings(model)
        # of each job the task that watches whether its client is still there
        self.watchers: dict[asyncio.Task, asyncio.Task] = {}
        self.turn = asyncio.Lock()
        self.reader = ThreadPoolExecutor(1)
        self.writer = ThreadPoolExecutor(1)

    def __len__(self) -> int:
        return len(self.watchers)

    def n_before(self, job: Job) -> int | None:
        """How many are before a job; None when it is done."""
        if job.task not in self.watchers:
            return None
        return list(self.watchers).index(job.task)

    def add(self, request: Request, question: ChatQuestion, options: dict[str, Any]) -> Job:
        """Start a request's work; it gives up its place when its client leaves."""
        out: asyncio.Queue = asyncio.Queue()
        job = Job(asyncio.create_task(self._write(out, question, options)), out)

        def end(task: asyncio.Task) -> None:
            del self.watchers[task]
            out.put_nowait(None)

        job.task.add_done_callback(end)
        self.watchers[job.task] = asyncio.create_task(self._watch(request, job.task))
        return job

    async def _write(
        self, out: asyncio.Queue, question: ChatQuestion, options: dict[str, Any]
    ) -> None:
        """One request from its pictures to the last word."""
        loop = asyncio.get_running_loop()
        prompt, pixels = await loop.run_in_executor(
            self.reader, prepare_question, self.model, self.tokenizer, self.template, question
        )
        answer = StreamedAnswer(
            self.model, self.tokenizer, prompt, pixels, beginnings=self.beginnings, **options
        )
        out.put_nowait((answer, len(prompt)))
        texts = iter(answer)
        try:
            # first come, first served
            async with self.turn:
                while True:
                    text = await loop.run_in_executor(self.writer, next, texts, None)
                    if text is None:
                        break
                    out.put_nowait(text)
        finally:
            # when cancelled: the thread is still at a token
            answer.interrupted = True

    async def _watch(self, request: Request, task: asyncio.Task) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    def failure(self, job: Job) -> Refusal | None:
        """What to tell when a job ended early; None when it did not."""
        if job.task.cancelled():
            return Refusal(503, "the server is stopping")
        error = job.task.exception()
        if error is None or isinstance(error, Refusal):
            return error
        print(f"serve.py: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        kind = type(error).__name__
        return Refusal(500, f"the model failed ({kind}), the server's terminal says more")

    def cancel(self) -> None:
        """End every answer at its next token."""
        for task in list(self.watchers):
            task.cancel()


# --- 3. an answer in OpenAI's words ---------------------------------------------------------------


class Reply:
    """An answer that has begun, as one JSON or as a stream of events."""

    def __init__(
        self,
        jobs: Jobs,
        job: Job,
        answer: StreamedAnswer,
        n_prompt: int,
        *,
        name: str,
        is_stream: bool,
        with_usage: bool,
    ):
        self.jobs = jobs
        self.job = job
        self.answer = answer
        self.n_prompt = n_prompt
        # whether a stream ends with the count of tokens
        self.with_usage = with_usage
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if is_stream else "chat.completion",
            "created": int(time.time()),
            "model": name,
        }

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.answer.n_new,
            "total_tokens": self.n_prompt + self.answer.n_new,
        }

    def event(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return f"data: {json.dumps(self.head | {'choices': [choice]})}\n\n"

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; while the job waits or writes, a comment a second says how many are
        before it.
        """
        yield self.event({"role": "assistant", "content": ""})
        while True:
            n_before = self.jobs.n_before(self.job)
            if n_before is not None:
                # a comment to all but our page
                yield f": queue {n_before}\n\n"
            try:
                while (text := await asyncio.wait_for(self.job.out.get(), 1)) is not None:
                    if text:
                        yield self.event({"content": text})
                break
            except TimeoutError:
                continue
        error = self.jobs.failure(self.job)
        if error:
            yield f"data: {json.dumps(error.body)}\n\n"
            return
        yield self.event({}, self.answer.finish_reason)
        if self.with_usage:
            last = self.head | {"choices": [], "usage": self.usage()}
            yield f"data: {json.dumps(last)}\n\n"
        yield "data: [DONE]\n\n"

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Refusal when it ended early."""
        texts = []
        while (text := await self.job.out.get()) is not None:
            texts.append(text)
        error = self.jobs.failure(self.job)
        if error:
            raise error
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(texts)},
            "finish_reason": self.answer.finish_reason,
            "logprobs": None,
        }
        return self.head | {"choices": [choice], "usage": self.usage()}


async def answer_chat(request: Request, jobs: Jobs, settings: ServerSettings) -> Response:
    """POST /v1/chat/completions."""
    body = await read_body(request, settings.max_body)
    question = read_messages(body.get("messages"))
    options = read_options(body, settings.max_new_tokens)
    stream_options = body.get("stream_options")
    if not isinstance(stream_options, dict):
        stream_options = {}
    is_stream = bool(body.get("stream"))
    if len(jobs) > settings.queue:
        raise Refusal(
            503, f"{settings.queue} questions wait already: try again later", "queue_full"
        )
    job = jobs.add(request, question, options)
    began = await job.out.get()
    if began is None:
        error = jobs.failure(job)
        assert error is not None, "a job that gave nothing must have failed"
        raise error
    answer, n_prompt = began
    reply = Reply(
        jobs,
        job,
        answer,
        n_prompt,
        name=settings.name,
        is_stream=is_stream,
        with_usage=bool(stream_options.get("include_usage")),
    )
    if not is_stream:
        return JSONResponse(await reply.whole())
    return StreamingResponse(
        reply.events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


# --- 4. the routes --------------------------------------------------------------------------------


async def show_refusal(request: Request, error: Exception) -> Response:
    """A Refusal, or what the framework itself refuses, such as an unknown path."""
    if isinstance(error, HTTPException):
        refusal = Refusal(error.status_code, str(error.detail))
        return JSONResponse(refusal.body, refusal.status, error.headers)
    assert isinstance(error, Refusal)
    return JSONResponse(error.body, error.status, error.headers)


async def show_fault(request: Request, error: Exception) -> Response:
    """A fault of ours; uvicorn prints it."""
    refusal = Refusal(500, "the server failed, its terminal says more")
    return JSONResponse(refusal.body, 500)


def build_app(model: Qilin, tokenizer: Tokenizer, settings: ServerSettings) -> tuple[FastAPI, Jobs]:
    """The application, and the requests that it answers or that wait."""
    jobs = Jobs(model, tokenizer, settings.template)
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        telemetry=TELEMETRY,  # pyright: ignore[reportArgumentType]
        dependencies=[Depends(check_caller)],
    )
    app.state.settings = settings
    app.add_exception_handler(Refusal, show_refusal)
    app.add_exception_handler(HTTPException, show_refusal)
    app.add_exception_handler(Exception, show_fault)

    @app.get("/")
    async def show_page():
        return HTMLResponse(CHAT_PAGE, headers=PAGE_HEADERS)

    @app.get("/health")
    async def show_health():
        return {"status": "ok", "model": settings.name, "jobs": len(jobs)}

    @app.get("/v1/models", dependencies=[Depends(check_key)])
    async def list_models():
        row = {"id": settings.name, "object": "model", "created": 0, "owned_by": "qilin-min"}
        return {"object": "list", "data": [row]}

    @app.post("/v1/chat/completions", dependencies=[Depends(check_key)], response_model=None)
    async def chat(request: Request):
        return await answer_chat(request, jobs, settings)

    return app, jobs


async def serve_app(app: FastAPI, jobs: Jobs, sock: socket.socket, greeting: str) -> None:
    """Until Ctrl-C or SIGTERM, which end every answer at its next token. greeting: said when it
    listens.
    """
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
        is_greeted = False
        while not server.should_exit:
            await asyncio.sleep(0.1)
            if server.started and not is_greeted:
                print(greeting, file=sys.stderr, flush=True)
                is_greeted = True
        jobs.cancel()
        # their clients are told
        await asyncio.sleep(0.5)
        # who is still sending a request is not waited for
        for connection in list(server.server_state.connections):
            if connection.transport is not None:
                connection.transport.close()

    watching = asyncio.create_task(watch())
    await server.serve([sock])
    await watching
