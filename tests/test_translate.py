"""Promise: `translate` loses no finished row and repeats none, whatever the endpoint or a kill
does, and keeps the form of the file it read.
"""

import csv
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from raw_sets import chinese_of, make_raw, prep

from chimed.prompts import REASONS
from common.rows import Records

OPTIONS = "--model", "test", "--yes", "--retry-delay", "0.01", "--timeout", "2"


@dataclass
class Reply:
    """What the server sends back. text: the whole body; without it a translation, `content`."""

    status: int = 200
    headers: dict = field(default_factory=dict)
    text: str | None = None
    content: str | None = None
    finish_reason: str = "stop"


def good_translation(english):
    return {name: chinese_of(text) for name, text in english.items()}


def reply_to(what, english, authorization):
    """The reply that a fault's name, a status or {field: text} stands for; None: a good one."""
    if isinstance(what, int):
        headers = {429: {"Retry-After": "0"}, 302: {"Location": "/v1/elsewhere"}}
        return Reply(what, headers.get(what, {}))
    if isinstance(what, dict):
        return Reply(content=json.dumps(what, ensure_ascii=False))
    good = json.dumps(good_translation(english), ensure_ascii=False)
    fenced = json.dumps(good_translation(english))
    replies = {
        None: Reply(content=good),
        "slow": Reply(content=good),
        "wait": Reply(429, {"Retry-After": "1"}),
        "quote": Reply(401, text="x" * 150 + f" wrong key {authorization}"),
        "endless": Reply(text=" " * 2**23 + "{}"),
        "malformed": Reply(text='{"choices": [{"mess'),
        "empty": Reply(content=""),
        "refusal": Reply(
            content="\u62b1\u6b49,\u6211\u65e0\u6cd5\u7ffb\u8bd1\u8be5\u5185\u5bb9\u3002"
        ),
        "words": Reply(content="Here is the translation you asked for."),
        "fence": Reply(content=f"```json\n{fenced}\n```"),
        "cut": Reply(content=good, finish_reason="length"),
        "english": Reply(content=json.dumps(english, ensure_ascii=False)),
    }
    return replies[what]


class Server:
    """A chat endpoint on loopback. behave(n, english, messages) -> what to do with the n-th
    request: a fault's name, or {field: text}; None translates well."""

    def __init__(self, behave=lambda n, english, messages: None):
        self.behave = behave
        self.requests, self.served, self.headers, self.lock = [], Counter(), [], threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                try:
                    raw = self.rfile.read(int(self.headers["Content-Length"]))
                    server.respond(self, raw)
                except (BrokenPipeError, ConnectionError):
                    pass  # the client was killed

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def respond(self, handler, raw):
        body = json.loads(raw)
        english = json.loads(body["messages"][1]["content"])
        with self.lock:
            n = len(self.requests)
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
        what = self.behave(n, english, body["messages"])
        if what == "drop":
            handler.connection.close()
            return
        if what == "hang":
            time.sleep(5)
            return
        if what == "slow":
            time.sleep(0.3)
        reply = reply_to(what, english, handler.headers["Authorization"])
        text = reply.text
        if reply.status == 200 and text is None:
            message = {"role": "assistant", "content": reply.content}
            choice = {"message": message, "finish_reason": reply.finish_reason}
            usage = {"prompt_tokens": 100, "completion_tokens": 50}
            text = json.dumps({"choices": [choice], "usage": usage})
            self.served[json.dumps(english, sort_keys=True)] += 1
        self.send(handler, reply, (text or "oops").encode())

    def send(self, handler, reply, raw):
        handler.send_response(reply.status)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(raw)),
            **reply.headers,
        }
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def translate(*options, env=None, check=None):
    return prep("translate", *options, env=env, code=check)


@pytest.fixture
def raw(tmp_path):
    return make_raw(tmp_path / "raw")


def test_every_set_comes_back_in_its_own_form(raw, tmp_path):
    with Server() as server:
        done = translate(
            "--pmc-oa",
            raw / "pmc_oa.jsonl",
            "--pmc-casereport",
            raw / "case.csv",
            "--pmc-vqa",
            raw / "train_2.csv",
            raw / "train.csv",
            "--out",
            tmp_path / "zh",
            "--base-url",
            server.url,
            *OPTIONS,
            "--price-in",
            1,
            "--price-out",
            2,
            env={"OPENAI_API_KEY": "sk-secret"},
            check=0,
        )
        assert (
            server.headers[0]["Authorization"] == "Bearer sk-secret"
            and "sk-secret" not in done.stdout + done.stderr
        )
    assert server.url.split("/")[2] in done.stderr and "No pictures" in done.stderr
    n = len(server.requests)
    assert (
        f"{100 * n:,} tokens read, {50 * n:,} written, cost {(100 * n + 2 * 50 * n) / 1e6:.4f}"
        in done.stderr
    )
    assert max(server.served.values()) == 1  # equal texts are asked for once
    for name, texts in (
        ("pmc_oa.jsonl", ["caption"]),
        ("case.csv", ["context", "question", "answer", "inline"]),
        ("train_2.csv", ["Caption", "Question"]),
        ("train.csv", ["Question"]),
    ):
        before, after = Records(raw / name), Records(tmp_path / "zh" / name)
        assert before.columns == after.columns and len(before) == len(after)
        for a, b in zip(before, after, strict=True):
            assert list(a) == list(b)
            for column in a:
                if column in texts:
                    assert b[column] == chinese_of(
                        a[column].removeprefix("Q: ").removeprefix("A: ")
                    )
                elif column.startswith("Choice"):
                    assert b[column] == a[column].strip()[:3] + chinese_of(
                        a[column].split(":")[1].strip()
                    )  # "A: text"
                elif name == "train.csv" and column == "Answer":
                    assert (
                        b[column] == chinese_of(a[column]) == b[f"Choice {a['Answer_label']}"][3:]
                    )
                else:
                    assert a[column] == b[column], column


def test_a_row_is_sent_whole_and_nothing_else(raw, tmp_path):
    with Server() as server:
        translate(
            "--pmc-casereport",
            raw / "case.csv",
            "--out",
            tmp_path / "zh",
            "--base-url",
            server.url,
            *OPTIONS,
            check=0,
        )
    sent = [json.loads(request["messages"][1]["content"]) for request in server.requests]
    assert all(set(fields) == {"context", "inline", "question", "answer"} for fields in sent)
    assert not re.search(r"PMC2\d\d\d|FIG\d", json.dumps(server.requests))  # no id, no file name


FAULTS = [
    "slow",
    "drop",
    429,
    500,
    503,
    "malformed",
    "empty",
    "refusal",
    "english",
    "words",
    "fence",
    "cut",
    {"caption": ""},
    {"wrong": "\u952e"},
]


def test_every_fault_is_retried(raw, tmp_path):
    """Each text meets four faults in turn before it is answered well, all fourteen among them: all
    rows arrive, all of them right.
    """
    seen, first, met, lock = Counter(), {}, set(), threading.Lock()

    def behave(n, english, messages):
        with lock:
            key = json.dumps(english)
            seen[key] += 1
            # three apart: never four answers in a row that make no sense, which a row does not
            # survive
            k = (first.setdefault(key, len(first)) + seen[key] * 3) % len(FAULTS)
            if seen[key] > 4:
                return None
            met.add(k)
            return FAULTS[k]

    with Server(behave) as server:
        done = translate(
            "--pmc-oa",
            raw / "pmc_oa.jsonl",
            "--pmc-vqa",
            raw / "train_2.csv",
            "--out",
            tmp_path / "zh",
            "--base-url",
            server.url,
            *OPTIONS,
            "--attempts",
            6,
            check=0,
        )
    assert (
        len(met) == len(FAULTS)
        and "retried:" in done.stderr
        and "status 429" in done.stderr
        and "status 50" in done.stderr
    )
    for name, column in (("pmc_oa.jsonl", "caption"), ("train_2.csv", "Question")):
        before, after = Records(raw / name), Records(tmp_path / "zh" / name)
        assert [chinese_of(row[column]) for row in before] == [row[column] for row in after]


@pytest.mark.parametrize(
    "answer, reason",
    [
        ({"caption": "轴位CT图像显示右肺下叶一{0}毫米结节。"}, "laterality"),
        ({"caption": "轴位CT图像显示左肺下叶一{0}厘米结节。"}, "units"),
        ({"caption": "轴位CT图像显示左肺下叶一99毫米结节。"}, "numbers"),
        ("english", "Chinese share"),
    ],
)
def test_what_stays_wrong_is_rejected_by_name(raw, tmp_path, answer, reason):
    """Rows of the first caption are answered badly every time, are asked for --attempts times with
    the reason, and end in rejected.jsonl; the others arrive.
    """

    def behave(n, english, messages):
        number = re.search(r"a (\d+) mm nodule", english["caption"])
        return (
            None
            if not number
            else answer
            if isinstance(answer, str)
            else {k: v.format(number[1]) for k, v in answer.items()}
        )

    with Server(behave) as server:
        done = translate(
            "--pmc-oa",
            raw / "pmc_oa.jsonl",
            "--out",
            tmp_path / "zh",
            "--base-url",
            server.url,
            *OPTIONS,
            "--attempts",
            3,
            check=0,
        )
        assert (
            sum("nodule" in request["messages"][1]["content"] for request in server.requests)
            == 2 * 3
        )  # articles 0 and 3
        assert any(
            REASONS[reason] in request["messages"][-1]["content"] for request in server.requests
        )
        rejected = [json.loads(line) for line in open(tmp_path / "zh/pmc_oa.jsonl.rejected.jsonl")]
        assert rejected and all(
            row["reasons"][0].startswith(reason) and "nodule" in row["english"]["caption"]
            for row in rejected
        )
        assert f"{reason} {len(rejected)}" in done.stdout
        assert len(Records(tmp_path / "zh/pmc_oa.jsonl")) + len(rejected) == len(
            Records(raw / "pmc_oa.jsonl")
        )
        n = len(server.requests)
        translate(
            "--pmc-oa",
            raw / "pmc_oa.jsonl",
            "--out",
            tmp_path / "zh",
            "--base-url",
            server.url,
            *OPTIONS,
            check=0,
        )
        assert len(server.requests) == n  # rejected is finished, too


def test_killed_at_any_moment_it_goes_on(tmp_path):
    """kill -9 five times at different moments: in the end every row is there, and no row that
    reached the journal was asked for twice.
    """
    raw = make_raw(tmp_path / "raw", n=60)
    finished_before, path = set(), tmp_path / "zh/train_2.csv.journal.jsonl"
    with Server(lambda n, english, messages: "slow" if n % 5 == 0 else None) as server:
        words = [
            sys.executable,
            ROOT / "data_prep.py",
            "translate",
            "--pmc-vqa",
            raw / "train_2.csv",
            "--out",
            tmp_path / "zh",
            "--base-url",
            server.url,
            *OPTIONS,
            "--concurrency",
            "4",
        ]
        for kills in range(5):
            process = subprocess.Popen(
                list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            target = 10 + 18 * kills
            while process.poll() is None and (
                not path.is_file() or path.read_bytes().count(b"\n") < target
            ):
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            whole = path.read_bytes()
            if kills == 2:
                path.write_bytes(whole[:-20])  # as if the kill had cut the last line
            keys = {
                json.dumps(line["english"], sort_keys=True)
                for line in map(json.loads, path.read_bytes().split(b"\n")[:-1])
                if "raw" not in line
            }
            assert finished_before <= keys or kills == 2
            finished_before = keys
            asked = Counter(server.served)
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(server.served[key] == asked[key] for key in finished_before)
    after = Records(tmp_path / "zh/train_2.csv")
    assert [row["Question"] for row in after] == [
        chinese_of(row["Question"]) for row in Records(raw / "train_2.csv")
    ]


def test_ctrl_c_keeps_what_is_done(tmp_path):
    raw = make_raw(tmp_path / "raw", n=150)  # a minute's work
    with Server(lambda n, *_: "slow") as server:
        process = subprocess.Popen(
            list(
                map(
                    str,
                    [
                        sys.executable,
                        ROOT / "data_prep.py",
                        "translate",
                        "--pmc-vqa",
                        raw / "train_2.csv",
                        "--out",
                        tmp_path / "zh",
                        "--base-url",
                        server.url,
                        *OPTIONS,
                        "--concurrency",
                        "2",
                    ],
                )
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        path = tmp_path / "zh/train_2.csv.journal.jsonl"
        while process.poll() is None and (not path.is_file() or path.read_bytes().count(b"\n") < 5):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130 and "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_wrong_key_or_address_stops_at_once(raw, tmp_path, status):
    with Server(lambda *_: status) as server:
        done = translate(
            "--pmc-oa",
            raw / "pmc_oa.jsonl",
            "--out",
            tmp_path / "zh",
            "--base-url",
            server.url,
            *OPTIONS,
            "--concurrency",
            2,
            check=2,
        )
        assert len(server.requests) <= 2 and str(status) in done.stderr.splitlines()[-1]


def test_a_row_the_endpoint_will_not_take_costs_only_itself(raw, tmp_path):
    """Two rows that are always refused (a content filter) are rejected by name, and all others
    arrive; --retry-rejected asks for them again, once more in vain, then with success.
    """
    with Server(
        lambda n, english, messages: 400 if "nodule" in english["caption"] else None
    ) as server:
        for more in ((), ("--retry-rejected",)):
            done = translate(
                "--pmc-oa",
                raw / "pmc_oa.jsonl",
                "--out",
                tmp_path / "zh",
                "--base-url",
                server.url,
                *OPTIONS,
                *more,
                check=0,
            )
            assert "10 rows of 12; 2 rejected" in done.stdout and "not translated 2" in done.stdout
            assert (
                len(Records(tmp_path / "zh/pmc_oa.jsonl")) == 10
                and len(Records(tmp_path / "zh/pmc_oa.jsonl.rejected.jsonl")) == 2
            )
    with Server() as server:
        translate(
            "--pmc-oa",
            raw / "pmc_oa.jsonl",
            "--out",
            tmp_path / "zh",
            "--base-url",
            server.url,
            *OPTIONS,
            "--retry-rejected",
            check=0,
        )
        assert len(server.requests) == 2 and len(Records(tmp_path / "zh/pmc_oa.jsonl")) == 12


def test_a_wait_that_is_asked_for_is_kept(raw, tmp_path):
    """Retry-After: 1: for a second nobody asks, neither the row that was told nor another."""
    times = []

    def behave(n, english, messages):
        times.append(time.monotonic())
        return "wait" if n == 0 else None

    with Server(behave) as server:
        translate(
            "--pmc-oa",
            raw / "pmc_oa.jsonl",
            "--out",
            tmp_path / "zh",
            "--base-url",
            server.url,
            *OPTIONS,
            "--concurrency",
            1,
            "--timeout",
            10,
            check=0,
        )
    assert times[1] - times[0] > 0.95


def test_an_endpoint_that_fails_every_time_is_given_up(tmp_path):
    """Of 80 rows no more are asked for than 20 that fail for good, with those under way; a key that
    the endpoint quotes is not shown; endless answers end.
    """
    raw = make_raw(tmp_path / "raw", n=40)
    words = "--pmc-vqa", raw / "train_2.csv", "--out", tmp_path / "zh"
    with Server(lambda *_: 500) as server:
        translate(
            *words, "--base-url", server.url, *OPTIONS, "--retries", 0, "--concurrency", 4, check=2
        )
        assert 20 <= len(server.requests) <= 24
    with Server(lambda *_: "quote") as server:
        done = translate(
            *words,
            "--base-url",
            server.url,
            *OPTIONS,
            env={"OPENAI_API_KEY": "sk-very-secret"},
            check=2,
        )
        assert "***" in done.stderr and "very-secret" not in done.stderr
    with Server(lambda *_: "endless") as server:
        done = translate(
            *words,
            "--base-url",
            server.url,
            *OPTIONS,
            "--retries",
            0,
            "--timeout",
            60,
            "--concurrency",
            4,
            check=2,
        )
        assert "answer without end" in done.stderr


def test_a_dead_endpoint_ends_in_one_line(raw, tmp_path):
    with Server(lambda *_: "hang") as server:
        done = translate(
            "--pmc-oa",
            raw / "pmc_oa.jsonl",
            "--out",
            tmp_path / "zh",
            "--base-url",
            server.url,
            "--model",
            "m",
            "--yes",
            "--timeout",
            0.2,
            "--retries",
            1,
            "--retry-delay",
            0.01,
            check=1,
        )
        assert "no answer within 0.2 s" in done.stderr.splitlines()[-1]
    done = translate(
        "--pmc-oa",
        raw / "pmc_oa.jsonl",
        "--out",
        tmp_path / "zh",
        "--base-url",
        "http://127.0.0.1:9/v1",
        *OPTIONS,
        "--retries",
        1,
        check=1,
    )
    assert "ConnectError" in done.stderr.splitlines()[-1]


def test_nothing_leaves_without_a_yes(raw, tmp_path):
    with Server() as server:
        done = subprocess.run(
            [
                sys.executable,
                ROOT / "data_prep.py",
                "translate",
                "--pmc-oa",
                raw / "pmc_oa.jsonl",
                "--out",
                tmp_path / "zh",
                "--base-url",
                server.url,
                "--model",
                "m",
            ],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 2 and "--yes" in done.stderr and not server.requests
        assert f"will be sent to 127.0.0.1:{server.http.server_address[1]}" in done.stderr


def test_the_glossary_is_enforced(raw, tmp_path):
    """The endpoint says 半月板； the glossary wants another word: it is told so, and rows without
    it are rejected. A glossary added later is applied to what is finished.
    """
    glossary = tmp_path / "terms.csv"
    glossary.write_text(
        "English,Chinese\nmedial meniscus,内侧半月软骨\nknee,膝|膝关节\n", encoding="utf-8"
    )

    def behave(n, english, messages):
        told = "内侧半月软骨" in messages[0]["content"]
        return {
            k: chinese_of(v).replace("内侧半月板", "内侧半月软骨")
            if told and "patient 3" not in english["question"]
            else chinese_of(v)
            for k, v in english.items()
        }

    with Server(behave) as server:
        translate(
            "--pmc-casereport",
            raw / "case.csv",
            "--out",
            tmp_path / "zh",
            "--base-url",
            server.url,
            *OPTIONS,
            check=0,
        )
        n = len(server.requests)
        done = translate(
            "--pmc-casereport",
            raw / "case.csv",
            "--out",
            tmp_path / "zh",
            "--base-url",
            server.url,
            *OPTIONS,
            "--glossary",
            glossary,
            check=0,
        )
        assert (
            len(server.requests) >= 2 * n
            and "1 rejected" in done.stdout
            and "glossary 1" in done.stdout
        )
    rows = list(Records(tmp_path / "zh/case.csv"))
    assert len(rows) == len(Records(raw / "case.csv")) - 1 and all(
        "内侧半月软骨" in row["answer"] for row in rows
    )


@pytest.mark.parametrize("form", ["pairs", "journal", "aligned"])
def test_finished_translations_need_no_endpoint(raw, tmp_path, form):
    given = tmp_path / "given.csv" if form == "pairs" else tmp_path / "given.jsonl"
    before = Records(raw / "case.csv")
    texts = [
        {
            k: row[k].removeprefix("Q: ").removeprefix("A: ")
            for k in ("context", "question", "answer", "inline")
        }
        for row in before
    ]
    if form == "pairs":
        with open(given, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [
                    ["English", "Chinese"],
                    *sorted({(t, chinese_of(t)) for row in texts[:-1] for t in row.values()}),
                ]
            )
    elif form == "journal":
        given.write_text(
            "".join(
                json.dumps({"english": row, "chinese": {k: chinese_of(v) for k, v in row.items()}})
                + "\n"
                for row in texts[:-1]
            )
        )
    else:
        given = tmp_path / "given.csv"
        with open(given, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [
                    before.columns,
                    *(
                        [
                            row["PMC_id"],
                            *(
                                chinese_of(t[k])
                                for k in ("context", "question", "answer", "inline")
                            ),
                            row["img_ref"],
                        ]
                        for row, t in zip(before, texts, strict=True)
                    ),
                ]
            )
    done = translate(
        "--pmc-casereport",
        raw / "case.csv",
        "--out",
        tmp_path / "zh",
        "--translations",
        given,
        check=0,
    )
    missing = 0 if form == "aligned" else 1
    assert ("1 without a translation given" in done.stdout) == bool(missing)
    after = list(Records(tmp_path / "zh/case.csv"))
    assert [row["question"] for row in after] == [
        chinese_of(row["question"]) for row in texts[: len(texts) - missing]
    ]


def test_two_runs_do_not_share_a_journal(raw, tmp_path):
    import fcntl

    (tmp_path / "zh").mkdir()
    with open(tmp_path / "zh/pmc_oa.jsonl.journal.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = translate(
            "--pmc-oa",
            raw / "pmc_oa.jsonl",
            "--out",
            tmp_path / "zh",
            "--base-url",
            "http://127.0.0.1:9/v1",
            *OPTIONS,
            check=2,
        )
    assert "in use by another run" in done.stderr


def test_what_cannot_be_translated_is_left_out_and_counted(tmp_path):
    (tmp_path / "oa.jsonl").write_text(
        "".join(
            json.dumps({"image": f"PMC1_{i}.jpg", "caption": text}) + "\n"
            for i, text in enumerate(
                [
                    "3.14 +- 2.71 (p = 0.05)",
                    "https://doi.org/10.1000/182 https://example.org/x",
                    "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQ",
                    "",
                    "已经是中文的图注。",
                ]
            )
        )
        + "not json\n"
    )
    done = translate("--pmc-oa", tmp_path / "oa.jsonl", "--out", tmp_path / "zh", check=0)
    for reason in (
        "impractical: mostly symbols 1",
        "impractical: mostly links 1",
        "impractical: a sequence 1",
        "no text 1",
        "not JSON 1",
        "1 were Chinese already",
    ):
        assert reason in done.stdout, done.stdout


def test_bad_usage_is_one_line(raw, tmp_path):
    for options, words in (
        (["--pmc-oa", tmp_path / "none.jsonl"], "no such data file"),
        (["--pmc-oa", raw / "case.csv"], "no 'image' in it"),
        ([], "name a raw set"),
        (["--pmc-oa", raw / "pmc_oa.jsonl"], "--base-url"),
        (
            ["--pmc-oa", raw / "pmc_oa.jsonl", "--base-url", "ftp://x", "--model", "m"],
            "must be like https",
        ),
        (["--pmc-oa", raw / "pmc_oa.jsonl", "--glossary", raw / "pmc_oa.jsonl"], "two columns"),
    ):
        done = translate(*options, "--out", tmp_path / "zh", check=2)
        assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
