"""Asks any OpenAI-compatible chat endpoint: named and agreed to before anything is sent, many
requests at once, faults retried, tokens and cost counted."""

import argparse
import asyncio
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import SplitResult, urlsplit, urlunsplit

from tqdm import tqdm

from common.files import one_line
from common.options import InRange

if TYPE_CHECKING:
    import httpx

Item = TypeVar("Item")
Result = TypeVar("Result")

# of one response: an endpoint that never stops talking must not fill memory
MAX_ANSWER_BYTES = 2**23
# answers to one request that make no sense: the same words asked again at temperature 0 seldom
# get better
MAX_NONSENSE = 4
# requests in a row that fail for good, with none answered between: then it is the endpoint
GIVE_UP_AFTER = 20
# seconds, before a retry
MAX_BACKOFF = 60.0
MAX_RETRY_AFTER = 600.0
# a key or an address that will not do, whatever is asked
STATUS_OF_ENDPOINT = (401, 402, 404, 405)
# another time it may go well
STATUS_FOR_NOW = (408, 409, 425, 429)


class RequestFailed(ValueError):
    """This one request got no usable answer. final: nor will it another time (refused, filtered,
    nonsense), unlike one lost to a fault of the line."""

    def __init__(self, reason: str, final: bool):
        super().__init__(reason)
        self.final = final


class EndpointFailed(ValueError):
    """No request will get an answer: wrong key, wrong address, or nobody there."""


class _Fault(Exception):
    """One attempt came to nothing; another may not. seconds: the endpoint asks for this pause."""

    def __init__(self, reason: str, *, seconds: float = 0.0, is_nonsense: bool = False):
        super().__init__(reason)
        self.reason = reason
        self.seconds = seconds
        self.is_nonsense = is_nonsense


# --- 1. options -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EndpointOptions:
    """Which endpoint is asked, and how: the values of add_endpoint_options."""

    base_url: str | None
    model: str | None
    api_key: str | None
    yes: bool
    concurrency: int
    timeout: float
    retries: int
    retry_delay: float
    price_in: float
    price_out: float
    extra_body: dict[str, Any]


def add_endpoint_options(parser: argparse.ArgumentParser) -> None:
    """The options whose values make EndpointOptions; --model is args.endpoint_model."""
    group = parser.add_argument_group(
        "endpoint (any OpenAI-compatible /chat/completions: OpenAI, Azure, DeepSeek, Qwen,"
        " or vLLM on your own machine)"
    )
    add = group.add_argument
    add(
        "--base-url",
        default=None,
        metavar="URL",
        help="e.g. https://api.openai.com/v1 (default: $OPENAI_BASE_URL)",
    )
    add(
        "--model",
        "--endpoint-model",
        dest="endpoint_model",
        default=os.environ.get("OPENAI_MODEL"),
        metavar="NAME",
        help="the model's name there (default: $OPENAI_MODEL)",
    )
    add(
        "--api-key",
        default=None,
        metavar="KEY",
        help="default: $OPENAI_API_KEY, which other users of the machine cannot see",
    )
    add("--yes", action="store_true", help="send without asking first")
    add(
        "--concurrency",
        action=InRange,
        type=int,
        low=1,
        high=1024,
        default=16,
        metavar="N",
        help="requests under way at once (default %(default)s)",
    )
    add(
        "--timeout",
        action=InRange,
        type=float,
        low=0.01,
        high=86400,
        default=120,
        metavar="S",
        help="seconds a request may take in all (default %(default)s)",
    )
    add(
        "--retries",
        action=InRange,
        type=int,
        low=0,
        high=1000,
        default=6,
        metavar="N",
        help="of a request that was refused for now, failed or made no sense (default %(default)s)",
    )
    add(
        "--retry-delay",
        action=InRange,
        type=float,
        low=0,
        high=600,
        default=1.0,
        metavar="S",
        help="seconds before the first retry, doubled each time up to 60, with jitter"
        " (default %(default)s)",
    )
    add(
        "--price-in",
        action=InRange,
        type=float,
        low=0,
        high=math.inf,
        default=0,
        metavar="X",
        help="price of a million tokens read, for the cost shown",
    )
    add(
        "--price-out",
        action=InRange,
        type=float,
        low=0,
        high=math.inf,
        default=0,
        metavar="X",
        help="price of a million tokens written",
    )
    add(
        "--extra-body",
        type=json.loads,
        default={},
        metavar="JSON",
        help="""more of the request, e.g. '{"response_format": {"type": "json_object"}}'""",
    )


# --- 2. the endpoint ------------------------------------------------------------------------------


class Endpoint:
    """One endpoint and what it has cost. ask() is for many tasks at once, inside
    `async with endpoint.connect()`. ValueError says what is wrong with the options."""

    def __init__(self, options: EndpointOptions):
        base = options.base_url or os.environ.get("OPENAI_BASE_URL")
        if not base or not options.model:
            raise ValueError(
                "name the endpoint by --base-url URL and --model NAME"
                " (or $OPENAI_BASE_URL, $OPENAI_MODEL)"
            )
        url = _chat_url(base)
        if not isinstance(options.extra_body, dict):
            raise ValueError("--extra-body must be a JSON object")
        self.options = options
        self.url = urlunsplit(url)
        self.host = url.netloc
        self.model = options.model
        self.local = url.hostname in ("localhost", "127.0.0.1", "::1")
        self.key = _key(options.api_key)

        self.tokens_in = 0
        self.tokens_out = 0
        self.answered = 0
        self.failed_in_a_row = 0
        # reason: how often; each was retried, or failed its row
        self.faults: Counter[str] = Counter()
        # monotonic seconds: nobody asks earlier, because somebody was told to wait
        self.not_before = 0.0
        self.client: httpx.AsyncClient | None = None
        self.httpx = _import_httpx()

    def confirm(self, what: str) -> None:
        """Say where and what will be sent, and have a yes, typed or by --yes. ValueError
        without."""
        is_open = not self.url.startswith("https") and not self.local
        warning = " WITHOUT ENCRYPTION (http)" if is_open else ""
        print(f"will be sent to {self.host}{warning}, model {self.model}: {what}", file=sys.stderr)
        if self.options.yes:
            return
        if not sys.stdin.isatty():
            raise ValueError(
                f"nothing was sent to {self.host}: add --yes to agree (no terminal to ask on)"
            )
        try:
            said = input("send it? type yes: ")
        except EOFError:
            said = ""
        if said.strip().lower() not in ("yes", "y", "\u662f"):
            raise ValueError(f"nothing was sent to {self.host}")

    @property
    def cost(self) -> float:
        read = self.tokens_in * self.options.price_in
        written = self.tokens_out * self.options.price_out
        return (read + written) / 1e6

    def status(self) -> str:
        """For the progress bar: tokens and cost so far, retries."""
        parts = [f"{self.tokens_in + self.tokens_out:,} tokens"]
        if self.cost:
            parts.append(f"cost {self.cost:.2f}")
        if self.faults:
            parts.append(f"{self.faults.total()} retries")
        return ", ".join(parts)

    def summary(self) -> str:
        """For the end: tokens and cost, and what was retried how often."""
        text = f"{self.tokens_in:,} tokens read, {self.tokens_out:,} written"
        if self.cost:
            text += f", cost {self.cost:.4f}"
        if self.faults:
            retried = [f"{reason} x {n}" for reason, n in self.faults.most_common()]
            text += f"; retried: {', '.join(retried)}"
        return text

    @asynccontextmanager
    async def connect(self) -> AsyncIterator["Endpoint"]:
        """The connections that ask() uses, closed at the end."""
        n = self.options.concurrency
        headers = {"Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        # a proxy from the environment is for the world outside, not for this machine; redirects
        # would carry texts to a host nobody agreed to
        async with self.httpx.AsyncClient(
            limits=self.httpx.Limits(max_connections=n, max_keepalive_connections=n),
            headers=headers,
            timeout=self.options.timeout,
            trust_env=not self.local,
            follow_redirects=False,
        ) as self.client:
            yield self

    async def ask(
        self,
        messages: list[dict[str, Any]],
        accept: Callable[..., Result] = lambda text: text,
        allow_cut: bool = False,
    ) -> Result:
        """accept(the answer) of one request, retried while the endpoint fails or accept raises
        ValueError. RequestFailed, EndpointFailed.

        allow_cut: an answer that ends at the endpoint's limit counts, too; accept is then told by
        a second argument, a bool."""
        attempt = 0
        nonsense = 0
        while True:
            await self._wait_until_allowed()
            try:
                return await self._attempt(messages, accept, allow_cut)
            except _Fault as error:
                fault = error
            self.faults[fault.reason] += 1
            nonsense += fault.is_nonsense
            if fault.seconds:
                self.not_before = max(self.not_before, time.monotonic() + fault.seconds)
            if nonsense == MAX_NONSENSE or attempt == self.options.retries:
                self._fail(fault.reason, final=fault.is_nonsense)
            await asyncio.sleep(max(fault.seconds, self._backoff(attempt)))
            attempt += 1

    async def _wait_until_allowed(self) -> None:
        wait = self.not_before - time.monotonic()
        while wait > 0:
            await asyncio.sleep(wait * random.uniform(1.0, 1.3))
            wait = self.not_before - time.monotonic()

    def _backoff(self, attempt: int) -> float:
        delay = min(MAX_BACKOFF, self.options.retry_delay * 2 ** min(attempt, 16))
        # jitter: or all come back at once
        return delay * random.uniform(0.5, 1.0)

    async def _attempt(
        self,
        messages: list[dict[str, Any]],
        accept: Callable[..., Result],
        allow_cut: bool,
    ) -> Result:
        """accept(the answer), asked for once. _Fault where another attempt may help."""
        timeout = self.options.timeout
        try:
            # in all: a server that drips a byte now and then is slow, too
            async with asyncio.timeout(timeout):
                text, is_cut = await self._post(messages)
            if is_cut and not allow_cut:
                raise ValueError("answer cut off at the endpoint's limit")
            result = accept(text, is_cut) if allow_cut else accept(text)
        except TimeoutError:
            raise _Fault(f"no answer within {timeout:g} s") from None
        except self.httpx.HTTPError as error:
            raise _Fault(f"connection: {type(error).__name__}") from None
        except (RequestFailed, EndpointFailed):
            raise
        except ValueError as error:
            raise _Fault(one_line(error), is_nonsense=True) from None
        self.answered += 1
        self.failed_in_a_row = 0
        return result

    def _fail(self, reason: str, final: bool) -> NoReturn:
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= GIVE_UP_AFTER:
            raise EndpointFailed(
                f"{self.host}: {GIVE_UP_AFTER} requests in a row failed, the last with: {reason}"
            )
        raise RequestFailed(reason, final)

    async def _post(self, messages: list[dict[str, Any]]) -> tuple[str, bool]:
        """The text of one answer, and whether it was cut off. Raises what the fault means: _Fault,
        RequestFailed, EndpointFailed, ValueError (worth another try)."""
        assert self.client is not None, "ask() outside connect()"
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            **self.options.extra_body,
        }
        async with self.client.stream("POST", self.url, json=body) as response:
            raw = b""
            # as it comes: a compressed answer could be a thousand times its size
            async for part in response.aiter_raw():
                raw += part
                if len(raw) > MAX_ANSWER_BYTES:
                    raise ValueError("answer without end")
        if response.status_code != 200:
            self._refused(response, self._without_key(raw))
        return self._read_answer(raw)

    def _without_key(self, raw: bytes) -> str:
        """What an endpoint says instead of an answer, short; some quote the key, as it is or as
        JSON has it."""
        said = raw[:5000].decode("utf-8", "replace")
        if self.key:
            said = said.replace(self.key, "***")
            said = said.replace(json.dumps(self.key)[1:-1], "***")
        return one_line(said[:200] or "no reason given")

    def _refused(self, response: "httpx.Response", said: str) -> NoReturn:
        """Raises what a status other than 200 means."""
        status = response.status_code
        is_redirect = 300 <= status < 400
        # once something was answered, it is about the one request
        is_forbidden = status == 403 and not self.answered
        if status in STATUS_OF_ENDPOINT or is_redirect or is_forbidden:
            raise EndpointFailed(f"{self.host} answers {status} ({said})")
        if status in STATUS_FOR_NOW or status >= 500:
            raise _Fault(f"status {status}", seconds=_retry_after(response))
        # this request is at fault: too long, or filtered
        self._fail(f"status {status}: {said}", final=True)

    def _read_answer(self, raw: bytes) -> tuple[str, bool]:
        try:
            answer = json.loads(raw)
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError):
            raise ValueError("malformed response") from None
        usage = answer.get("usage")
        # paid for, whatever the answer is worth
        if isinstance(usage, dict):
            self.tokens_in += _token_count(usage.get("prompt_tokens"))
            self.tokens_out += _token_count(usage.get("completion_tokens"))
        if not isinstance(text, str) or not text.strip():
            raise ValueError("empty answer")
        return text, choice.get("finish_reason") == "length"


def _import_httpx() -> ModuleType:
    try:
        import httpx
    except ImportError:
        raise ValueError("asking an endpoint needs httpx: pip install httpx") from None
    return httpx


def _chat_url(base: str) -> SplitResult:
    """Where requests to --base-url go. ValueError."""
    shown = "(with a password)" if "@" in base else base
    invalid = ValueError(f"--base-url {shown}: must be like https://host/v1")
    try:
        url = urlsplit(base)
        port = url.port
    except ValueError:
        raise invalid from None
    if url.scheme not in ("http", "https") or not url.hostname or port == 0:
        raise invalid
    if url.username or url.password:
        raise ValueError("--base-url must not carry a password: use $OPENAI_API_KEY")
    path = url.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return url._replace(path=path, fragment="")


def _key(given: str | None) -> str:
    key = os.environ.get("OPENAI_API_KEY", "") if given is None else given
    key = key.strip()
    if not key.isascii() or not key.isprintable():
        raise ValueError("the API key holds characters that no key has")
    return key


def _token_count(value: object) -> int:
    if isinstance(value, int) and 0 <= value < 10**9:
        return value
    return 0


def _retry_after(response: "httpx.Response") -> float:
    try:
        seconds = float(response.headers.get("retry-after", 0))
    except ValueError:
        # a date: the backoff serves
        return 0.0
    return min(MAX_RETRY_AFTER, max(0.0, seconds))


# --- 3. many requests -----------------------------------------------------------------------------


async def ask_many(
    endpoint: Endpoint,
    items: Iterable[Item],
    ask_one: Callable[[Item], Awaitable[None]],
    bar: tqdm,
) -> None:
    """ask_one(item) for every item, as many at once as --concurrency allows; the bar moves with
    each. What ask_one raises stops them all."""
    rest = iter(items)

    async def worker() -> None:
        # one iterator, shared: the next goes to whoever is free
        for item in rest:
            await ask_one(item)
            bar.update()
            bar.set_postfix_str(endpoint.status())

    async with endpoint.connect():
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(endpoint.options.concurrency):
                    group.create_task(worker())
        except ExceptionGroup as errors:
            # all have stopped; the first says why
            raise errors.exceptions[0] from None
