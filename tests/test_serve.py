"""Promise: serve.py answers what generate() answers, to the openai client and to a real browser;
one at a time, in order; bad input is refused and harms nobody.
"""

import base64
import http.client
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import httpx
import numpy as np
import openai
import pytest
from conftest import ROOT, make_qilin
from PIL import Image

import qilin_min as q
from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.pixels import preprocess_image
from model_io.tokens import StreamedAnswer, Tokenizer, encode_prompt

TEXT = dict(vocab_size=32000, hidden_size=32, intermediate_size=48, max_position_embeddings=2048)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
LONG = dict(max_tokens=1900)  # an answer of some seconds


@pytest.fixture(scope="module")
def world(tmp_path_factory, spm_path):
    """(model, tokenizer, folder): random weights, the real tokenizer; two pictures beside."""
    folder = tmp_path_factory.mktemp("serve")
    save_qilin(make_qilin(text=TEXT, n_token_ids=32000), Tokenizer(spm_path), folder / "tiny")
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    for name, pixels in zip("ab", noise, strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return load_qilin(folder / "tiny"), Tokenizer(folder / "tiny"), folder


def start(world, *options, run=(ROOT / "serve.py",), **env):
    """(process, URL) of a server that is ready."""
    command = list(
        map(str, [sys.executable, *run, "--model", world[2] / "tiny", "--port", 0, *options])
    )
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS="1", **env)
    )
    for line in process.stderr:
        if found := re.search(r"(http://\S+) answers with .*no medical advice", line):
            return process, found[1]
    raise AssertionError(f"it ended with {process.wait()}")


@pytest.fixture(scope="module")
def server(world):
    """URL of a server with room for two that wait and bodies of 1 MB. At the end SIGTERM ends it,
    and it has not complained.
    """
    process, url = start(world, "--queue", 2, "--max-body-mb", 1, "--max-new-tokens", 12)
    yield url
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 143 and said == "", said


@pytest.fixture(scope="module")
def guarded(world):
    """(process, URL) of a server with a key, where nobody may wait."""
    process, url = start(world, "--queue", 0, QILIN_API_KEY="secret")
    yield process, url
    process.kill()
    process.wait()


def client(url, key="none"):
    return openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=60)


def data_url(content, kind="image/png"):
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def asks(text, *pictures):
    """A user's message; pictures are bytes."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def post(url, body, **options):
    headers = {"Content-Type": "application/json"} | options.pop("headers", {})
    return httpx.post(
        url + "/v1/chat/completions",
        content=body if isinstance(body, bytes) else json.dumps(body),
        headers=headers,
        timeout=60,
        **options,
    )


def want(world, texts, n_images=0, pictures=(), max_new_tokens=12, **options):
    """(text, prompt) that generate() itself gives."""
    model, tokenizer, _ = world
    conversation = [
        {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)
    ]
    prompt = encode_prompt(conversation, tokenizer, model.config.n_image_tokens, n_images=n_images)
    pixels = (
        q.torch.stack([preprocess_image(path, 56, model.config.image_mode) for path in pictures])
        if pictures
        else None
    )
    return tokenizer.decode(
        q.answer_ids(model, [prompt], pixels, max_new_tokens=max_new_tokens, **options)[0]
    ), prompt


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def jobs(url):
    return httpx.get(url + "/health").json()["jobs"]


def begun(url, length, *headers):
    """The bytes of a request whose body of `length` bytes ends after its first."""
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {url[7:]}",
        *headers,
        "Content-Type: application/json",
        f"Content-Length: {length}",
    ]
    return ("\r\n".join(head) + "\r\n\r\n{").encode()


def is_well(world, url):
    answer = post(url, {"messages": [asks("well?")]})
    return (
        answer.status_code == 200
        and answer.json()["choices"][0]["message"]["content"] == want(world, ["well?"])[0]
        and jobs(url) == 0
    )


# --- 1. the same answers as without a server ------------------------------------------------------


def cases(folder):
    """name: (messages, texts, n_images, pictures) of one conversation, as a client and as
    encode_prompt says it.
    """
    a, b = (folder / "a.png").read_bytes(), (folder / "b.png").read_bytes()
    assistant = {"role": "assistant", "content": "an <image> of </s>"}
    return {
        "text": ([asks("什么是肺结节？")], ["什么是肺结节？"], 0, []),
        "picture": ([asks("what?", a)], ["what?"], 1, ["a.png"]),
        "two pictures": ([asks("compare", b, a)], ["compare"], 2, ["b.png", "a.png"]),
        "a picture alone": ([asks("", a)], [""], 1, ["a.png"]),
        "several turns": (
            [asks("what?", a), assistant, asks("sure?")],
            ["what?", "an <image> of </s>", "sure?"],
            1,
            ["a.png"],
        ),
        "a picture in a later turn": (
            [asks("hello"), assistant, asks("and this?", b)],
            ["hello", "an <image> of </s>", "and this?"],
            [0, 1],
            ["b.png"],
        ),
        "typed control words": (
            [asks("<image> <s> </s>\n<image>", a)],
            ["<image> <s> </s>\n<image>"],
            1,
            ["a.png"],
        ),
        "NUL": ([asks("a\0b")], ["a\0b"], 0, []),
        "system": (
            [{"role": "system", "content": "be brief"}, asks("what?", a)],
            ["be brief\nwhat?"],
            1,
            ["a.png"],
        ),
    }


def test_the_openai_client_hears_what_generate_says(world, server):
    answers = {}
    for name, (messages, texts, n_images, pictures) in cases(world[2]).items():
        text, prompt = want(world, texts, n_images, [world[2] / picture for picture in pictures])
        whole = client(server).chat.completions.create(model="any", messages=messages)
        assert (
            whole.choices[0].message.content == text
            and whole.choices[0].message.role == "assistant"
            and whole.model == "tiny"
        ), name
        assert (
            whole.usage.prompt_tokens,
            whole.usage.completion_tokens,
            whole.choices[0].finish_reason,
        ) == (len(prompt), 12, "length"), name
        chunks = list(
            client(server).chat.completions.create(
                model="any", messages=messages, stream=True, stream_options={"include_usage": True}
            )
        )
        assert (
            "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
            and len(chunks) > 4
        ), name
        assert (
            chunks[-1].usage == whole.usage
            and chunks[-2].choices[0].finish_reason == "length"
            and not chunks[-1].choices
        ), name
        answers[name] = text
    assert len(set(answers.values())) == len(answers)  # each part of a request shows in its answer
    assert [model.id for model in client(server).models.list()] == ["tiny"]


def test_options_are_honoured(world, server):
    def ask(**options):
        return (
            client(server)
            .chat.completions.create(model="any", messages=[asks("draw")], **options)
            .choices[0]
        )

    options = dict(temperature=1.0, top_p=0.9, seed=7)
    assert (
        ask(**options).message.content
        == want(world, ["draw"], **options)[0]
        == ask(**options).message.content
        != ask(**options | {"seed": 8}).message.content
    )
    vllm = {"top_k": 3, "repetition_penalty": 1.3}
    assert (
        ask(extra_body=vllm, temperature=1.0, seed=1).message.content
        == want(world, ["draw"], temperature=1.0, seed=1, **vllm)[0]
    )
    assert (
        ask(temperature=1e-40, extra_body={"top_k": -1}).message.content == want(world, ["draw"])[0]
    )
    assert (
        ask(max_tokens=3).message.content
        == ask(max_completion_tokens=3).message.content
        == want(world, ["draw"], max_new_tokens=3)[0]
    )
    text = want(world, ["draw"])[0]
    for stop in (text[5:9], [text[8:10], text[5:9]]):
        cut = ask(stop=stop)
        assert (
            cut.message.content
            == text[: min(text.find(s) for s in ([stop] if isinstance(stop, str) else stop))]
            and cut.finish_reason == "stop"
        )
    plain = {
        "n": 1,
        "tools": [],
        "response_format": {"type": "text"},
        "logprobs": False,
        "user": "me",
        "metadata": {},
        "stop": None,
        "temperature": None,
        "stream": None,
    }
    assert (
        post(server, plain | {"messages": [asks("draw")]}).json()["choices"][0]["message"][
            "content"
        ]
        == text
    )


def test_an_answer_ends_at_the_last_position(world, server):
    prompt = want(world, ["long " * 1900])[1]
    answer = client(server).chat.completions.create(
        model="any", messages=[asks("long " * 1900)], max_tokens=10**6
    )
    assert (
        answer.choices[0].finish_reason == "length"
        and answer.usage.total_tokens == 2048 == len(prompt) + answer.usage.completion_tokens
    )


# --- 2. bad input ---------------------------------------------------------------------------------


def saved(mode, size, kind):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def bomb(width, height):
    """A PNG that claims so many pixels."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_bad_pictures_are_refused_and_harm_nobody(world, server):
    good = (world[2] / "a.png").read_bytes()
    bad = {
        "empty": b"",
        "truncated": good[:200],
        "truncated in its head": good[:20],
        "no picture": b"hello " * 50,
        "100 megapixels": saved("L", (10000, 10000), "PNG"),
        "bomb": bomb(50000, 50000),
        "line": saved("1", (60000, 1), "PNG"),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "DICOM": b"\0" * 128 + b"DICM" + b"\xff" * 40,
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    for name, picture in bad.items():
        for stream in (False, True):
            answer = post(server, {"messages": [asks("what?", good, picture)], "stream": stream})
            error = answer.json()["error"]
            assert (
                answer.status_code == 400
                and "picture 2" in error["message"]
                and error["type"] == "invalid_request_error"
            ), (name, answer.text)
            assert not re.search(r"BytesIO|0x[0-9a-f]{6}|Traceback|/tmp|\.py", error["message"]), (
                name,
                error,
            )
            assert (
                name != "EPS" or "identify" in error["message"]
            )  # Pillow would start Ghostscript for it
    urls = {
        "https://a.b/c.png": "data URL",
        "file:///etc/passwd": "data URL",
        "/etc/passwd": "data URL",
        "data:": "base64",
        "data:image/png,abc": "base64",
        "data:image/png;base64,@@@": "damaged",
        "data:image/png;base64,\u56fe": "damaged",
        "": "data URL",
    }
    for url, said in urls.items():
        answer = post(
            server,
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
                ]
            },
        )
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], (
            url,
            answer.text,
        )
    with pytest.raises(openai.BadRequestError, match="does not decode"):
        client(server).chat.completions.create(
            model="any", messages=[asks("what?", good[:100])], stream=True
        )
    assert is_well(world, server)


def test_pictures_of_many_kinds_are_read(world, server):
    for mode, kind in (
        ("CMYK", "JPEG"),
        ("I;16", "PNG"),
        ("P", "GIF"),
        ("RGBA", "WEBP"),
        ("1", "TIFF"),
        ("L", "BMP"),
    ):
        assert (
            post(server, {"messages": [asks("what?", saved(mode, (30, 20), kind))]}).status_code
            == 200
        ), kind


BAD = [
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"[]", "object"),
    (b"[" * 100000, "JSON"),
    (b"\xff\xfe\xfd", "JSON"),
    (b'{"seed": 1' + b"0" * 5000 + b"}", "JSON"),
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": {}}, "messages"),
    ({"messages": [1]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [asks(" ")]}, "empty"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "role"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "role"),
    ({"messages": [asks("a"), asks("b")]}, "messages[1].role must be assistant"),
    ({"messages": [asks("a"), {"role": "assistant", "content": "b"}]}, "ends with"),
    ({"messages": [{"role": "system", "content": "b"}]}, "ends with"),
    (
        {"messages": [asks("a"), {"role": "assistant", "content": ""}, asks("c")]},
        "messages[1] is empty",
    ),
    ({"messages": [asks("a"), {"role": "system", "content": "b"}, asks("c")]}, "system first"),
    (
        {"messages": [{"role": "system", "content": asks("a", b"b")["content"]}, asks("c")]},
        "only the user",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "content"),
    ({"messages": [asks("a\ud800b")]}, "Unicode"),
    ({"messages": [{"role": "\ud800", "content": "a"}]}, "role"),
    ({"messages": [asks("word " * 2100)]}, "2048"),
    ({"messages": [asks("x" * 500000)]}, "2048"),
    ({"messages": [asks("many", *[b"x"] * 128)]}, "2048"),
]
BAD_VALUES = [
    ("temperature", -1),
    ("temperature", float("nan")),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", 3),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", 1.5),
    ("top_k", -2),
    ("seed", 2**63),
    ("max_tokens", 0),
    ("max_tokens", 1e400),
    ("max_tokens", 1.5),
    ("max_completion_tokens", "5"),
    ("repetition_penalty", 0),
    ("n", 2),
    ("tools", [{"type": "function"}]),
    ("logprobs", True),
    ("response_format", {"type": "json_object"}),
    ("stop", [""]),
    ("stop", 3),
    ("stop", ["a"] * 17),
    ("stop", "a" * 201),
    ("stream", "yes"),
    ("presence_penalty", 1),
    ("logit_bias", {"5": 1}),
]


@pytest.mark.parametrize(
    "body, said",
    BAD + [({"messages": [asks("a")], name: value}, name) for name, value in BAD_VALUES],
)
def test_bad_requests_are_refused(server, body, said):
    answer = post(server, body)
    error = answer.json()["error"]
    assert (
        answer.status_code == 400
        and said in error["message"]
        and set(error) == {"message", "type", "param", "code"}
    ), answer.text
    if said == "2048":
        assert error["code"] == "context_length_exceeded"


def test_after_bad_requests_all_is_well(world, server):
    assert is_well(world, server)


def test_other_addresses_and_methods(server):
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
    ):
        answer = httpx.request(method, server + path)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_body_is_counted_while_it_comes(world, server):
    """Too large with its length told, or in pieces that tell nothing; and a client that never ends
    is cut off.
    """
    large, sent = json.dumps({"messages": [asks("a" * 1200000)]}).encode(), []

    def endless():
        for _ in range(10**5):
            sent.append(65536)
            yield b" " * 65536

    for body in (large, (large[i : i + 65536] for i in range(0, len(large), 65536))):
        answer = httpx.post(
            server + "/v1/chat/completions",
            content=body,
            headers={"Content-Type": "application/json"},
            timeout=20,
        )
        assert answer.status_code == 413 and "1 MB" in answer.json()["error"]["message"]
    try:
        assert (
            httpx.post(
                server + "/v1/chat/completions",
                content=endless(),
                headers={"Content-Type": "application/json"},
                timeout=20,
            ).status_code
            == 413
        )
    except httpx.HTTPError:
        pass  # the connection was closed: as good
    assert sum(sent) < 2**28
    assert is_well(world, server)


def test_a_slow_body_holds_nobody_up(world, server):
    host, port = server[7:].split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(begun(server, 1000))
        assert is_well(world, server)


def test_other_web_sites_are_refused(world, server):
    """What a page elsewhere could make a browser send: a form, a script of its own origin, a name
    pointed at 127.0.0.1.
    """
    good = {"messages": [asks("a")], "max_tokens": 1}
    port = server.rpartition(":")[2]
    for headers, status in (
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Host": f"evil.example:{port}"}, 403),
        ({"Host": f"127.0.0.1.evil.example:{port}"}, 403),
        ({"Origin": server}, 200),
        ({"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ):
        answer = post(server, good, headers=headers)
        assert (
            answer.status_code == status and "access-control-allow-origin" not in answer.headers
        ), (headers, answer.text)
    assert httpx.get(server, headers={"Host": "evil.example"}).status_code == 403
    page = httpx.get(server)
    assert (
        page.status_code == 200
        and "default-src 'none'" in page.headers["content-security-policy"]
        and "http" not in page.text.replace("http-equiv", "")
    )


def test_the_key(guarded):
    _, url = guarded
    good = {"messages": [asks("a")], "max_tokens": 1}
    for header in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Bearer \u00e9".encode("latin-1")},
    ):
        answer = post(url, good, headers=header)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(url + "/v1/models").status_code == 401
    with pytest.raises(openai.AuthenticationError):
        client(url, "wrong").models.list()
    assert (
        client(url, "secret").chat.completions.create(model="any", **good).usage.completion_tokens
        == 1
    )


# --- 3. one at a time, in order -------------------------------------------------------------------


class Ask(threading.Thread):
    """A request in a thread of its own: status, text, when it ended."""

    def __init__(self, url, text, **options):
        super().__init__(daemon=True)
        self.url, self.body = url, {"messages": [asks(text)]} | options
        self.start()

    def run(self):
        answer = post(self.url, self.body)
        self.status, self.ended = answer.status_code, time.monotonic()
        self.text = (
            answer.json()["choices"][0]["message"]["content"]
            if answer.status_code == 200
            else answer.text
        )


def long_answer(url, text, stream, **headers):
    """A connection with a long answer under way, to be closed by the caller."""
    connection = http.client.HTTPConnection(url[7:], timeout=30)
    connection.request(
        "POST",
        "/v1/chat/completions",
        json.dumps({"messages": [asks(text)], "stream": stream} | LONG),
        {"Content-Type": "application/json"} | headers,
    )
    return connection


def test_requests_wait_in_order_and_the_queue_is_bounded(world, server):
    asked = []
    # long enough to be heard of in order
    for i, n in enumerate((700, 150, 150)):
        asked.append(Ask(server, f"question {i}", max_tokens=n))
        wait_until(lambda n_jobs=i + 1: jobs(server) == n_jobs)
    full = post(server, {"messages": [asks("one more")]})
    assert (
        full.status_code == 503
        and full.json()["error"]["code"] == "queue_full"
        and full.headers["retry-after"]
    )
    for i, one in enumerate(asked):
        one.join(60)
        assert (
            one.status == 200
            and one.text == want(world, [f"question {i}"], max_new_tokens=700 if i == 0 else 150)[0]
        )
    assert asked[0].ended < asked[1].ended < asked[2].ended
    assert is_well(world, server)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_gives_up_the_place(world, server, stream):
    first, second = long_answer(server, "first", stream), None
    wait_until(lambda: jobs(server) == 1)
    second = long_answer(server, "second", stream)
    wait_until(lambda: jobs(server) == 2)
    if stream:
        response = first.getresponse()
        assert response.readline().startswith(b"data: ")
        response.close()
    second.close()
    wait_until(lambda: jobs(server) == 1, 5)
    first.close()
    tic = time.monotonic()
    wait_until(lambda: jobs(server) == 0, 5)
    assert (
        is_well(world, server) and time.monotonic() - tic < 1.5
    )  # the rest, some 3 s of it, was not waited for


def test_an_answer_is_interrupted_between_texts(world):
    """A model may write many ids without a whole character: the thread asks between them."""
    model, tokenizer, _ = world
    answer = StreamedAnswer(model, tokenizer, want(world, ["a"])[1], max_new_tokens=50)
    next(iter(answer))
    n, answer.interrupted = answer.n_new, True
    assert "".join(answer) == "" and answer.n_new <= n + 1 and len(answer.ids) == n


def test_a_waiting_stream_says_how_many_are_before_it(world, server):
    first = long_answer(server, "first", True)
    wait_until(lambda: jobs(server) == 1)
    with httpx.stream(
        "POST",
        server + "/v1/chat/completions",
        json={"messages": [asks("well?")], "stream": True},
        timeout=60,
    ) as response:
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith(":")) == ": queue 1"
        first.close()
        said = [
            json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            for line in lines
            if line.startswith("data: {")
        ]
    assert "".join(said) == want(world, ["well?"])[0]


# --- 4. the page, in a real browser ---------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 390, "height": 760})
    page.set_default_timeout(15000)
    page.complaints = []
    page.on(
        "console",
        lambda message: page.complaints.append(message.text) if message.type == "error" else None,
    )
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    yield page
    page.close()


def ended(page, n):
    """The text of the n-th answer, once no answer is under way."""
    page.locator(".turn").nth(n - 1).wait_for()
    page.locator("#send").wait_for()
    return page.locator(".turn").nth(n - 1).locator(".answer").text_content()


def test_the_page_asks_and_shows_the_streamed_answer(world, server, page):
    a, b = world[2] / "a.png", world[2] / "b.png"
    page.goto(server)
    page.locator("#files").set_input_files([a])
    page.locator("#pending img").wait_for()
    page.locator("#text").fill("what?")
    page.locator("#text").press("Enter")
    first = ended(page, 1)
    assert (
        first == want(world, ["what?"], 1, [a])[0]
        and page.locator(".turn .pictures img").count() == 1
        and page.locator("#text").input_value() == ""
    )
    drop = page.evaluate_handle(
        """text => { const data = new DataTransfer();
        const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
        data.items.add(new File([bytes], "b.png", { type: "image/png" })); return data; }""",
        base64.b64encode(b.read_bytes()).decode(),
    )
    page.dispatch_event("main", "drop", {"dataTransfer": drop})
    page.locator("#pending img").wait_for()
    page.locator("#text").fill("and <b>this</b>?")
    page.locator("#send").click()
    assert (
        ended(page, 2) == want(world, ["what?", first, "and <b>this</b>?"], [1, 1], [a, b])[0]
    )  # the history went along
    assert (
        page.locator(".question b").count() == 0
        and page.locator(".question").nth(1).text_content() == "and <b>this</b>?"
    )
    page.locator("#clear").click()
    assert page.locator(".turn").count() == 0 and page.locator(".hint").count() == 1
    page.locator("#text").fill("well?")
    page.locator("#text").press("Enter")
    assert ended(page, 1) == want(world, ["well?"])[0] and page.complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_page_shows_errors_and_gives_the_question_back(world, server, page):
    (world[2] / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM\xff")
    page.goto(server)
    page.locator("#files").set_input_files([world[2] / "broken.dcm"])
    assert (
        page.locator("#pending span").text_content() == "broken.dcm"
    )  # no browser shows it: its name stands there
    page.locator("#text").fill("what?")
    page.locator("#text").press("Enter")
    page.locator(".error").wait_for()
    assert (
        "the picture" in page.locator(".error").text_content()
        and page.locator("#text").input_value() == "what?"
    )
    page.locator("#pending button").click()
    page.locator("#send").click()
    assert ended(page, 2) == want(world, ["what?"])[0]
    assert all("400" in complaint for complaint in page.complaints)


def test_the_page_stops_and_waits(world, guarded, page):
    """The stop button, a queue that is full, and the key."""
    _, url = guarded
    page.goto(url)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(
            post_data=json.dumps(json.loads(route.request.post_data) | LONG)
        ),
    )
    page.locator("#text").fill("what?")
    page.locator("#text").press("Enter")
    page.locator(".error").wait_for()
    page.locator("#key").fill("secret")
    page.locator("#send").click()
    page.locator(".turn").nth(1).locator(".answer:not(:empty)").wait_for()
    full = post(url, {"messages": [asks("a")]}, headers={"Authorization": "Bearer secret"})
    page.locator("#stop").click()
    said = ended(page, 2)
    text = want(world, ["what?"], max_new_tokens=200)[0]
    assert (
        full.status_code == 503
        and len(said) > 0
        and (text.startswith(said) or said.startswith(text))
    )
    assert "stopped" in page.locator(".turn").nth(1).locator(".state").text_content()
    wait_until(lambda: jobs(url) == 0, 5)


# --- 5. what goes wrong within --------------------------------------------------------------------

ODD = """import sys; sys.path.insert(0, sys.argv.pop(1)); import serve; from serving import app

class Failing(app.StreamedAnswer):
    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        self._text = self.fail(self._text)

    def fail(self, texts):
        yield next(texts)
        raise RuntimeError("details for the terminal")

app.StreamedAnswer, app.BODY_SECONDS = Failing, 1
serve.run_cli(serve.main)
"""


def test_a_model_that_fails_and_a_body_that_does_not_come(world):
    process, url = start(world, run=["-c", ODD, ROOT])
    try:
        answer = post(url, {"messages": [asks("a")]})
        assert (
            answer.status_code == 500
            and answer.json()["error"]["type"] == "server_error"
            and "details" not in answer.text
        )
        with pytest.raises(openai.APIError, match="the model failed"):
            list(
                client(url).chat.completions.create(model="any", messages=[asks("a")], stream=True)
            )
        with socket.create_connection(url[7:].split(":")) as slow:
            slow.sendall(begun(url, 1000))
            assert b" 408 " in slow.recv(1000)
        assert jobs(url) == 0
    finally:
        process.kill()
    said = process.communicate()[1]
    assert said.count("details for the terminal") == 2 and "Traceback" not in said


# --- 6. beginning and end -------------------------------------------------------------------------


def test_ctrl_c_ends_it_within_an_answer(guarded):
    """Also while a client has not sent its request to the end."""
    process, url = guarded
    slow = socket.create_connection(url[7:].split(":"))
    slow.sendall(begun(url, 9, "Authorization: Bearer secret"))
    connection = long_answer(url, "a", True, Authorization="Bearer secret")
    connection.getresponse().readline()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=10)[1]
    slow.close()
    assert process.returncode == 130 and said.strip() == "", said
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--port", "{port}"], "port {port}"),
        (["--port", "70000"], "--port"),
        (["--host", "nowhere.invalid"], "nowhere.invalid"),
        (["--model", "gone"], "gone"),
        (["--model", "gone", "--host", "0.0.0.0"], "gone"),
        (["--api-key", "\u00e9"], "API key"),
        (["--queue", "-1"], "--queue"),
        (["--max-body-mb", "nan"], "--max-body-mb"),
        ("no fastapi", "pip install fastapi uvicorn"),
    ],
)
def test_what_keeps_it_from_starting_is_said_in_a_line(server, monkeypatch, capsys, options, said):
    if options == "no fastapi":
        monkeypatch.setitem(sys.modules, "fastapi", None)
    port = server.rpartition(":")[2]
    words = [] if options == "no fastapi" else [word.format(port=port) for word in options]
    monkeypatch.setattr(sys, "argv", ["serve.py", "--port", "0", *words])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "serve.py"), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, before)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and said.format(port=port) in lines[-1]
    assert (
        lines[:-1] == []
        or "0.0.0.0" in words
        and "warning" in lines[0]
        and "QILIN_API_KEY" in lines[0]
        and len(lines) == 2
    )


def test_help_teaches(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "serve.py"), run_name="__main__")
    assert (
        end.value.code == 0 and "/v1" in (said := capsys.readouterr().out) and "--quantize" in said
    )
