"""Asks any OpenAI-compatible chat endpoint: named and agreed to before anything is sent, many requests at once, faults retried, tokens and cost counted."""

import asyncio
import json
import math
import os
import random
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

from common.files import check_ranges, one_line

MAX_ANSWER_BYTES = (
    2**23
)  # of one response: an endpoint that never stops talking must not fill memory
MAX_NONSENSE = 4  # answers to one request that make no sense: the same words asked again at temperature 0 seldom get better
GIVE_UP_AFTER = (
    20  # requests in a row that fail for good, with none answered between: then it is the endpoint
)


class RequestFailed(ValueError):
    """This one request got no usable answer. final: nor will it another time (refused, filtered, nonsense), unlike one lost to a fault of the line."""

    def __init__(self, reason, final):
        super().__init__(reason)
        self.final = final


class EndpointFailed(ValueError):
    """No request will get an answer: wrong key, wrong address, or nobody there."""


def add_endpoint_flags(parser):
    group = parser.add_argument_group(
        "endpoint (any OpenAI-compatible /chat/completions: OpenAI, Azure, DeepSeek, Qwen, or vLLM on your own machine)"
    )
    group.add_argument(
        "--base-url",
        default=None,
        metavar="URL",
        help="e.g. https://api.openai.com/v1 (default: $OPENAI_BASE_URL)",
    )
    group.add_argument(
        "--model",
        "--endpoint-model",
        dest="endpoint_model",
        default=os.environ.get("OPENAI_MODEL"),
        metavar="NAME",
        help="the model's name there (default: $OPENAI_MODEL)",
    )
    group.add_argument(
        "--api-key",
        default=None,
        metavar="KEY",
        help="default: $OPENAI_API_KEY, which other users of the machine cannot see",
    )
    group.add_argument("--yes", action="store_true", help="send without asking first")
    group.add_argument(
        "--concurrency",
        type=int,
        default=16,
        metavar="N",
        help="requests under way at once (default %(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=120,
        metavar="S",
        help="seconds a request may take in all (default %(default)s)",
    )
    group.add_argument(
        "--retries",
        type=int,
        default=6,
        metavar="N",
        help="of a request that was refused for now, failed or made no sense (default %(default)s)",
    )
    group.add_argument(
        "--retry-delay",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds before the first retry, doubled each time up to 60, with jitter (default %(default)s)",
    )
    group.add_argument(
        "--price-in",
        type=float,
        default=0,
        metavar="X",
        help="price of a million tokens read, for the cost shown",
    )
    group.add_argument(
        "--price-out", type=float, default=0, metavar="X", help="price of a million tokens written"
    )
    group.add_argument(
        "--extra-body",
        type=json.loads,
        default={},
        metavar="JSON",
        help="""more of the request, e.g. '{"response_format": {"type": "json_object"}}'""",
    )


class Endpoint:
    """One endpoint and what it has cost. ask() is for many tasks at once, inside `async with endpoint.connect()`."""

    def __init__(self, args):
        check_ranges(
            args,
            concurrency=(1, 1024),
            timeout=(0.01, 86400),
            retries=(0, 1000),
            retry_delay=(0, 600),
            price_in=(0, math.inf),
            price_out=(0, math.inf),
        )
        base = args.base_url or os.environ.get("OPENAI_BASE_URL")
        if not base or not args.endpoint_model:
            raise ValueError(
                "name the endpoint by --base-url URL and --model NAME (or $OPENAI_BASE_URL, $OPENAI_MODEL)"
            )
        try:
            url = urlsplit(base)
            valid = (
                url.scheme in ("http", "https")
                and url.hostname
                and (url.port is None or url.port > 0)
            )
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(
                f"--base-url {base if '@' not in base else '(with a password)'}: must be like https://host/v1"
            )
        if url.username or url.password:
            raise ValueError("--base-url must not carry a password: use $OPENAI_API_KEY")
        if not isinstance(args.extra_body, dict):
            raise ValueError("--extra-body must be a JSON object")
        path = url.path.rstrip("/")
        self.url = urlunsplit(
            url._replace(
                path=path if path.endswith("/chat/completions") else f"{path}/chat/completions",
                fragment="",
            )
        )
        self.host, self.model, self.args = url.netloc, args.endpoint_model, args
        self.local = url.hostname in ("localhost", "127.0.0.1", "::1")
        self.key = (
            args.api_key if args.api_key is not None else os.environ.get("OPENAI_API_KEY", "")
        ).strip()
        if not self.key.isascii() or not self.key.isprintable():
            raise ValueError("the API key holds characters that no key has")
        self.tokens_in = self.tokens_out = self.answered = self.failed_in_a_row = 0
        self.faults = Counter()  # reason: how often; each was retried, or failed its row
        self.not_before = (
            0.0  # monotonic seconds: nobody asks earlier, because somebody was told to wait
        )
        try:
            import httpx
        except ImportError:
            raise ValueError("asking an endpoint needs httpx: pip install httpx") from None
        self.httpx = httpx

    def confirm(self, what):
        """Say where and what will be sent, and have a yes, typed or by --yes. ValueError without."""
        open_key = (
            "" if self.url.startswith("https") or self.local else " WITHOUT ENCRYPTION (http)"
        )
        print(f"will be sent to {self.host}{open_key}, model {self.model}: {what}", file=sys.stderr)
        if self.args.yes:
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
    def cost(self):
        return (self.tokens_in * self.args.price_in + self.tokens_out * self.args.price_out) / 1e6

    def status(self):
        """For the progress bar: tokens and cost so far, retries."""
        return (
            f"{self.tokens_in + self.tokens_out:,} tokens"
            + (f", cost {self.cost:.2f}" if self.cost else "")
            + (f", {n} retries" if (n := self.faults.total()) else "")
        )

    @asynccontextmanager
    async def connect(self):
        limits = self.httpx.Limits(
            max_connections=self.args.concurrency, max_keepalive_connections=self.args.concurrency
        )
        headers = {"Accept-Encoding": "identity"} | (
            {"Authorization": f"Bearer {self.key}"} if self.key else {}
        )
        # a proxy from the environment is for the world outside, not for this machine; redirects would carry texts to a host nobody agreed to
        async with self.httpx.AsyncClient(
            limits=limits,
            headers=headers,
            timeout=self.args.timeout,
            trust_env=not self.local,
            follow_redirects=False,
        ) as self.client:
            yield self

    async def ask(self, messages, accept=lambda text: text, allow_cut=False):
        """accept(the answer) of one request, retried while the endpoint fails or accept raises ValueError. RequestFailed, EndpointFailed.

        allow_cut: an answer that ends at the endpoint's limit counts, too; accept is then told by a second argument, a bool."""
        nonsense = 0
        for attempt in range(self.args.retries + 1):
            while (wait := self.not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait * random.uniform(1.0, 1.3))
            wait, final = 0.0, False
            try:
                async with asyncio.timeout(
                    self.args.timeout
                ):  # in all: a server that drips a byte now and then is slow, too
                    text, cut = await self._post(messages)
                if cut and not allow_cut:
                    raise ValueError("answer cut off at the endpoint's limit")
                result = accept(text, cut) if allow_cut else accept(text)
                self.answered, self.failed_in_a_row = self.answered + 1, 0
                return result
            except TimeoutError:
                reason = f"no answer within {self.args.timeout:g} s"
            except _Later as error:
                reason, wait = str(error), error.seconds
            except self.httpx.HTTPError as error:
                reason = f"connection: {type(error).__name__}"
            except (RequestFailed, EndpointFailed):
                raise
            except ValueError as error:
                reason, final, nonsense = one_line(error), True, nonsense + 1
            self.faults[reason] += 1
            delay = max(
                wait,
                min(60.0, self.args.retry_delay * 2 ** min(attempt, 16)) * random.uniform(0.5, 1.0),
            )  # jitter: or all come back at once
            if wait:
                self.not_before = max(self.not_before, time.monotonic() + wait)
            if nonsense == MAX_NONSENSE:
                break
            if attempt < self.args.retries:
                await asyncio.sleep(delay)
        self._failed(reason, final)

    def _failed(self, reason, final):
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= GIVE_UP_AFTER:
            raise EndpointFailed(
                f"{self.host}: {GIVE_UP_AFTER} requests in a row failed, the last with: {reason}"
            )
        raise RequestFailed(reason, final)

    async def _post(self, messages):
        """The text of one answer, and whether it was cut off. Raises what the fault means: _Later, RequestFailed, EndpointFailed, ValueError (worth another try)."""
        body = {"model": self.model, "messages": messages, "temperature": 0, **self.args.extra_body}
        async with self.client.stream("POST", self.url, json=body) as response:
            raw = b""
            async for part in (
                response.aiter_raw()
            ):  # as it comes: a compressed answer could be a thousand times its size
                raw += part
                if len(raw) > MAX_ANSWER_BYTES:
                    raise ValueError("answer without end")
        said = raw[:5000].decode("utf-8", "replace")
        for secret in {self.key, json.dumps(self.key)[1:-1]} - {""}:  # some endpoints quote it
            said = said.replace(secret, "***")
        said = one_line(said[:200] or "no reason given")
        if (
            response.status_code in (401, 402, 404, 405)
            or 300 <= response.status_code < 400
            or response.status_code == 403
            and not self.answered
        ):
            raise EndpointFailed(f"{self.host} answers {response.status_code} ({said})")
        if response.status_code in (408, 409, 425, 429) or response.status_code >= 500:
            raise _Later(f"status {response.status_code}", _retry_after(response))
        if response.status_code != 200:  # this request is at fault: too long, or filtered
            self._failed(f"status {response.status_code}: {said}", final=True)
        try:
            answer = json.loads(raw)
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError):
            raise ValueError("malformed response") from None
        usage = answer.get("usage")
        if isinstance(usage, dict):  # paid for, whatever the answer is worth
            counts = [
                n if isinstance(n := usage.get(name), int) and 0 <= n < 10**9 else 0
                for name in ("prompt_tokens", "completion_tokens")
            ]
            self.tokens_in, self.tokens_out = (
                self.tokens_in + counts[0],
                self.tokens_out + counts[1],
            )
        if not isinstance(text, str) or not text.strip():
            raise ValueError("empty answer")
        return text, choice.get("finish_reason") == "length"


class _Later(Exception):
    def __init__(self, reason, seconds):
        super().__init__(reason)
        self.seconds = seconds


def _retry_after(response):
    try:
        return min(600.0, max(0.0, float(response.headers.get("retry-after", 0))))
    except ValueError:
        return 0.0  # a date: the backoff serves


async def ask_many(endpoint, todo, messages_of, keep, bar, **options):
    """Asks for every item of todo ({key: item}), several at once, keep(key, item, answer) as each comes. -> {key: why there is none}."""
    failed, items = {}, iter(todo.items())

    async def worker():
        for key, item in items:  # one iterator, shared: the next goes to whoever is free
            try:
                keep(
                    key,
                    item,
                    await endpoint.ask(await asyncio.to_thread(messages_of, item), **options),
                )
            except EndpointFailed:
                raise
            except ValueError as error:  # this one only: it is asked again in the next run
                failed[key] = one_line(error)
            bar.update()
            bar.set_postfix_str(endpoint.status())

    async with endpoint.connect():
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(endpoint.args.concurrency):
                    group.create_task(worker())
        except ExceptionGroup as errors:  # all have stopped; the first says why
            raise errors.exceptions[0] from None
    return failed
