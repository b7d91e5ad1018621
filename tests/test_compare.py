"""Promise: `compare` shows what every system answers to the same questions, sends no more than was
agreed to, repeats and loses no answer; what doctors rank blind is counted right."""

import base64
import contextlib
import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import ROOT, in_process, make_qilin
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_dicom import SECRETS, dicom
from transformers import LlavaForConditionalGeneration

import evaluate
import qilin_min as q
from common.intervals import wilson
from evaluation import compare
from evaluation.pages import RANKING_COLUMNS, html_text, markdown_text, visible
from evaluation.ranking import interval, read_keys
from evaluation.testsets import Question, read_testset, wording
from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.pixels import open_image, preprocess_image
from model_io.tokens import encode_prompt

OPTIONS = "--yes", "--retry-delay", 0.01, "--timeout", 2, "--max-new-tokens", 6


def run(*words, code=None, env=None):
    """`python evaluate.py words`: its exit code, stdout and stderr."""
    return in_process(evaluate.main, *words, code=code, env=env)


def asked(body):
    """The question of a request."""
    content = body["messages"][-1]["content"]
    return (
        content
        if isinstance(content, str)
        else next((part["text"] for part in content if part["type"] == "text"), "")
    )


class Server:
    """A vision endpoint on loopback. behave(n, question) -> a fault's name or status, or the
    answer; n counts from 0 how often this question was asked."""

    def __init__(self, behave=lambda n, question: f"see: {question}"):
        self.requests, self.headers, self.counts, self.lock = [], [], Counter(), threading.Lock()

        def respond(handler, raw):
            body = json.loads(raw)
            question = asked(body)
            with self.lock:
                self.requests.append(body)
                self.headers.append(dict(handler.headers))
                n = self.counts[question]
                self.counts[question] += 1
            what, status, finish = behave(n, question), 200, "stop"
            if what == "hang":
                time.sleep(4)
                return
            if what == "drop":
                handler.connection.close()
                return
            if what == "slow":
                time.sleep(0.2)
                what = f"see: {question}"
            if what == "long":
                what, finish = "a long story", "length"
            if isinstance(what, int):
                status, what = what, "oops"
            answer = {
                "choices": [{"message": {"content": what}, "finish_reason": finish}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 5},
            }
            answer = json.dumps(answer) if status == 200 else what
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(answer.encode())))
            handler.end_headers()
            handler.wfile.write(answer.encode())

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                with contextlib.suppress(
                    ConnectionError, json.JSONDecodeError
                ):  # the client was killed
                    respond(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """Two folders that answer differently: our own export, and one that transformers saved, as
    LLaVA-1.5 is published."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("ours", 3), ("first", 4)):
        model = make_qilin(
            text=dict(
                vocab_size=32000,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_key_value_heads=4,
            ),
            n_token_ids=32000,
            seed=seed,
        )
        save_qilin(model, tokenizer, folder / name)
    LlavaForConditionalGeneration.from_pretrained(folder / "first").save_pretrained(
        folder / "llava"
    )
    shutil.copy(folder / "first/tokenizer.model", folder / "llava")
    return folder


@pytest.fixture
def world(tmp_path):
    """questions.json: 6 questions with one picture, two, none; pictures with EXIF, a profile, a
    text chunk, 16 bits and a DICOM header."""
    images, rng = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x013B] = 6, "SECRETPATIENT", "SECRETDOCTOR"
    picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    picture.save(
        images / "SECRETNAME.jpg", exif=exif, comment="SECRETCOMMENT", icc_profile=b"SECRETPROFILE"
    )
    notes = PngInfo()
    notes.add_text("Comment", "SECRETTEXT")
    picture.save(images / "note.png", pnginfo=notes)
    Image.fromarray(rng.integers(0, 65536, (30, 30), dtype=np.uint16)).save(images / "deep.png")
    picture.resize((900, 300)).save(images / "wide.png")
    dicom(images / "scan.dcm", rng.integers(0, 4096, (20, 20), dtype=np.uint16))
    rows = [
        (["SECRETNAME.jpg"], "图中有什么", "肿块"),
        (["note.png"], "病灶在哪里", "左肺"),
        (["deep.png"], "Is it CT?", "yes"),
        (["wide.png", "deep.png"], "两张图相同吗", "不同"),
        ([], "什么是结节", "小的病灶"),
        (["scan.dcm"], "有几个病灶", "一个"),
    ]
    write_questions(tmp_path / "questions.json", rows)
    return tmp_path


def write_questions(path, rows):
    path.write_text(
        json.dumps(
            [
                {
                    "id": f"id-{i}",
                    "image": images,
                    "kind": "toy",
                    "conversations": [
                        {"from": "human", "value": "<image>\n" * len(images) + question},
                        {"from": "gpt", "value": truth},
                    ],
                }
                for i, (images, question, truth) in enumerate(rows)
            ]
        )
    )


def ask(world, *systems, code=0, env=None, more=()):
    """compare of world's questions."""
    words = [word for system in systems for word in ("--system", system)]
    return run(
        "compare",
        world / "questions.json",
        "--images",
        world / "images",
        *words,
        "--out",
        world / "out",
        *OPTIONS,
        *more,
        code=code,
        env=env,
    )


class Page(HTMLParser):
    """The tags of a page, and its texts by the class they stand in."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if dict(attrs).get("class") == "text":
            self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data


def lines_of(world):
    return [json.loads(line) for line in (world / "out/answers.jsonl").read_bytes().splitlines()]


# --- 1. answers -----------------------------------------------------------------------------------


def test_both_pages_show_what_each_system_answers(world, models, tokenizer):
    """Answers of folders are those of answer_ids for the question alone, those of the endpoint what
    it said, in both pages; pictures lie in the one and beside the other."""
    with Server() as server:
        done = ask(
            world,
            f"Ours={models / 'ours'}",
            f"LLaVA-1.5={models / 'llava'}",
            f"GPT-4V={server.url}#gpt",
        )
    questions = read_testset(world / "questions.json", world / "images")[1]
    page, text, markdown = (
        Page(world / "out/compare.html"),
        (world / "out/compare.html").read_text(),
        (world / "out/compare.md").read_text(),
    )
    answers = {(line["system"], line["question"]): line["text"] for line in lines_of(world)}
    assert len(answers) == 18 and "6 questions" in done.stdout
    for name, folder in (("Ours", "ours"), ("LLaVA-1.5", "llava")):
        model = load_qilin(models / folder)
        for question in questions:
            pixels = [preprocess_image(path, 56) for path in question.pictures]
            prompt = encode_prompt(
                [{"from": "human", "value": wording(question)}],
                tokenizer,
                model.config.n_image_tokens,
                n_images=len(pixels),
            )
            ids = q.answer_ids(
                model, [prompt], torch.stack(pixels) if pixels else None, max_new_tokens=6
            )[0]
            assert answers[name, wording(question)] == tokenizer.decode(ids).strip()
    assert any(
        answers["Ours", wording(question)] != answers["LLaVA-1.5", wording(question)]
        for question in questions
    )
    assert all(
        answers["GPT-4V", wording(question)] == f"see: {wording(question)}"
        for question in questions
    )
    for answer in answers.values():
        assert (
            any(visible(answer) in shown for shown in page.texts)
            and markdown_text(answer, {}) in markdown
        )
    assert all(
        question.truth in markdown and any(question.truth in shown for shown in page.texts)
        for question in questions
    )
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert (
        len(sources) == 6
        and all(source.startswith("data:image/jpeg;base64,") for source in sources)
        and not re.search(r'(?:src|href)="(?!data:)', text)
    )
    beside = re.findall(r"!\[\]\((.*?)\)", markdown)
    assert [base64.b64decode(source.split(",")[1]) for source in sources] == [
        (world / "out" / name).read_bytes() for name in beside
    ]
    assert (
        max(Image.open(world / "out" / name).width for name in beside) == 640
        and "SECRET" not in text + markdown
    )
    assert not any(b"SECRET" in (world / "out" / name).read_bytes() for name in beside)
    assert "Research only" in text and "Research only" in markdown


def test_the_published_sets_and_dialogs_of_several_turns(world, models, tokenizer):
    """PMC-VQA and SLAKE are asked without their options; of a dialog the last question, after the
    turns before it, each picture where it stands."""
    (world / "vqa.csv").write_text(
        "Figure_path,Question,Choice A,Choice B,Choice C,Choice D,Answer,Answer_label\n"
        "note.png,Which <image> organ?,A: Liver,B: Lung,C: Heart,D: Bone,Lung,B\n"
    )
    (world / "slake.json").write_text(
        json.dumps(
            [
                {
                    "img_name": "deep.png",
                    "question": "Which side?",
                    "answer": "Left",
                    "qid": 7,
                    "q_lang": "en",
                    "modality": "CT",
                }
            ]
        )
    )
    turns = [("human", "<image>\nFirst?"), ("gpt", "One."), ("human", "And <image> this?")]
    (world / "dialog.json").write_text(
        json.dumps(
            [
                {
                    "id": "d",
                    "image": ["note.png", "deep.png"],
                    "conversations": [
                        {"from": who, "value": text} for who, text in [*turns, ("gpt", "Two.")]
                    ],
                }
            ]
        )
    )
    with Server() as server:
        for name in ("vqa.csv", "slake.json", "dialog.json"):
            words = (
                world / name,
                "--images",
                world / "images",
                "--system",
                f"G={server.url}#m",
                "--system",
                f"Ours={models / 'ours'}",
                "--out",
                world / name.split(".")[0],
            )
            run("compare", *words, *OPTIONS, code=0)
    assert [[message["role"] for message in body["messages"]] for body in server.requests] == [
        ["user"],
        ["user"],
        ["user", "assistant", "user"],
    ]
    assert (
        asked(server.requests[0]).endswith("organ?")
        and "Liver" not in json.dumps(server.requests)
        and asked(server.requests[1]) == "Which side?"
    )
    first, said, last = (message["content"] for message in server.requests[2]["messages"])
    assert [part["type"] for part in first] == [part["type"] for part in last] == [
        "image_url",
        "text",
    ] and said == "One."
    assert [first[1]["text"], last[1]["text"]] == ["First?", "And  this?"]
    page, model = (world / "dialog/compare.html").read_text(), load_qilin(models / "ours")
    assert (
        all(text in page for text in ("First?", "One.", "And  this?", "Two."))
        and page.count("<img") == 2
    )
    prompt = encode_prompt(
        [{"from": who, "value": text} for who, text in turns],
        tokenizer,
        model.config.n_image_tokens,
    )
    pixels = torch.stack(
        [preprocess_image(world / "images" / name, 56) for name in ("note.png", "deep.png")]
    )
    answer = next(
        line["text"]
        for line in map(json.loads, open(world / "dialog/answers.jsonl"))
        if line["system"] == "Ours"
    )
    assert (
        answer
        == tokenizer.decode(q.answer_ids(model, [prompt], pixels, max_new_tokens=6)[0]).strip()
    )


def test_of_a_picture_only_the_pixels_leave(world):
    with Server() as server:
        done = ask(
            world,
            f"GPT-4V={server.url}#the/model",
            env={"GPT_4V_API_KEY": "sk-own", "OPENAI_API_KEY": "sk-other"},
        )
    assert (
        "will be sent to 127.0.0.1" in done.stderr
        and "model the/model" in done.stderr
        and "6 questions and 6 pictures" in done.stderr
    )
    questions = {
        wording(question): question
        for question in read_testset(world / "questions.json", world / "images")[1]
    }
    assert (
        len(server.requests) == 6
        and all(headers["Authorization"] == "Bearer sk-own" for headers in server.headers)
        and "sk-" not in done.stdout + done.stderr
    )
    for body in server.requests:
        assert (
            body["model"] == "the/model"
            and body["temperature"] == 0
            and body["max_tokens"] == 6
            and len(body["messages"]) == 1
        )
        content, question = body["messages"][0]["content"], questions[asked(body)]
        sent = (
            [
                base64.b64decode(part["image_url"]["url"].split(",")[1])
                for part in content
                if part["type"] == "image_url"
            ]
            if question.pictures
            else []
        )
        assert isinstance(content, str) != bool(question.pictures) and len(sent) == len(
            question.pictures
        )
        for raw, path in zip(sent, question.pictures, strict=True):
            image = Image.open(io.BytesIO(raw))
            assert (
                not image.getexif()
                and not image.info
                and not any(secret.encode() in raw for secret in ("SECRET", *SECRETS))
            )
            assert np.array_equal(
                np.asarray(image), np.asarray(open_image(path))
            )  # upright, 8 bits, all of them
        assert "SECRET" not in json.dumps(body) and "id-" not in json.dumps(body)


def test_nothing_is_sent_without_a_yes(world):
    with Server() as server:
        done = run(
            "compare",
            world / "questions.json",
            "--images",
            world / "images",
            "--system",
            f"G={server.url}#m",
            "--out",
            world / "out",
            code=2,
        )
        assert (
            "nothing was sent" in done.stderr
            and "6 questions and 6 pictures" in done.stderr
            and not server.requests
        )
        done = ask(
            world, f"G={server.url}#m", more=("--gloss",), code=2
        )  # and without an endpoint for the gloss none either
        assert "--base-url" in done.stderr and not server.requests


def test_every_fault_is_retried(world):
    faults = ["slow", 429, 500, "drop", "hang", ""]
    order = {}
    with Server(
        lambda n, question: (
            f"see: {question}" if n else faults[order.setdefault(question, len(order))]
        )
    ) as server:
        done = ask(world, f"G={server.url}#m", more=("--timeout", 1, "--concurrency", 3))
    assert sorted(server.counts.values()) == [1, 2, 2, 2, 2, 2] and "retried" in done.stderr
    assert {line["text"] for line in lines_of(world)} == {
        f"see: {question}" for question in server.counts
    }


def test_one_refused_question_costs_only_its_cell(world):
    """The cell says what failed, exit code 1; the next run asks for it alone, and then the page is
    whole."""
    with Server(
        lambda n, question: 400 if "几" in question and n == 0 else f"see: {question}"
    ) as server:
        done = ask(world, f"G={server.url}#m", code=1)
        assert "1 texts are missing" in done.stderr and "400" in done.stderr
        assert (
            "no answer: status 400" in (world / "out/compare.html").read_text()
            and "no answer:* status 400" in (world / "out/compare.md").read_text()
        )
        assert len(server.requests) == 6
        ask(world, f"G={server.url}#m")
        assert (
            len(server.requests) == 7
            and "no answer:" not in (world / "out/compare.html").read_text()
        )
        ask(world, f"G={server.url}#m")
        assert len(server.requests) == 7


def test_a_dead_endpoint_leaves_the_others(world, models):
    with Server(lambda n, question: 401) as server:
        done = ask(world, f"Dead={server.url}#m", f"Ours={models / 'ours'}", code=1)
        assert (
            len([line for line in done.stderr.splitlines() if line.startswith("Dead: ")]) == 1
            and "401" in done.stderr
        )
        assert (
            len(lines_of(world)) == 6 and "answers 401" in (world / "out/compare.html").read_text()
        )
        done = run(
            "compare",
            world / "questions.json",
            "--images",
            world / "images",
            "--system",
            f"Dead={server.url}#m",
            "--out",
            world / "alone",
            *OPTIONS,
            code=2,
        )
        assert (
            "nobody answered anything" in done.stderr.splitlines()[-1]
            and not (world / "alone/compare.html").exists()
        )


def test_an_answer_at_the_limit_is_shown_as_cut(world):
    with Server(lambda n, question: "long") as server:
        ask(world, f"G={server.url}#m")
    assert (
        len(server.requests) == 6
        and all(line["cut"] for line in lines_of(world))
        and "a long story …" in (world / "out/compare.md").read_text()
    )


def test_killed_at_any_moment_it_goes_on(world):
    """kill -9 twice, and a torn last line: no answer that reached the file is asked for again, and
    all are there in the end."""
    write_questions(
        world / "questions.json", [(["note.png"], f"question {i}", "x") for i in range(20)]
    )
    path, kept = world / "out/answers.jsonl", set()
    with Server(lambda n, question: "slow") as server:
        words = [
            sys.executable,
            ROOT / "evaluate.py",
            "compare",
            world / "questions.json",
            "--images",
            world / "images",
            "--system",
            f"G={server.url}#m",
            "--out",
            world / "out",
            *OPTIONS,
            "--concurrency",
            2,
        ]
        for target in (4, 10):
            process = subprocess.Popen(
                list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while process.poll() is None and (
                not path.is_file() or path.read_bytes().count(b"\n") < target
            ):
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            path.write_bytes(path.read_bytes().rsplit(b"\n", 1)[0] + b'\n{"key": "torn')
            assert kept <= {
                line["question"] for line in map(json.loads, path.read_bytes().splitlines()[:-1])
            }
            kept = {
                line["question"] for line in map(json.loads, path.read_bytes().splitlines()[:-1])
            }
            before = Counter(server.counts)
        ask(world, f"G={server.url}#m")
    assert len(kept) >= 10 and all(server.counts[question] == before[question] for question in kept)
    assert sorted(line["question"] for line in lines_of(world)) == sorted(
        f"question {i}" for i in range(20)
    )


def test_what_changed_is_asked_anew(world, models):
    with Server() as server:
        ask(world, f"G={server.url}#m", f"Ours={models / 'ours'}")
        n = len(server.requests)
        Image.new("RGB", (20, 20), "red").save(world / "images/deep.png")  # of two questions
        ask(world, f"G={server.url}#m", f"Ours={models / 'ours'}")
        assert len(server.requests) == n + 2 and len(lines_of(world)) == 12 + 4
        ask(world, f"G={server.url}#other")
        assert len(server.requests) == n + 2 + 6
        ask(world, f"G={server.url}#other", more=("--max-new-tokens", 7))
        assert len(server.requests) == n + 2 + 12


def test_which_questions(world):
    with Server() as server:
        ask(world, f"G={server.url}#m", more=("--ids", "id-4, id-0"))
        assert [asked(body) for body in sorted(server.requests, key=asked)] == sorted(
            ["什么是结节", "图中有什么"]
        )
        assert "id-9" in ask(world, f"G={server.url}#m", more=("--ids", "id-9"), code=2).stderr
    pages = []
    for seed in (0, 0, 1):
        with Server() as server:
            shutil.rmtree(world / "out")
            ask(world, f"G={server.url}#m", more=("--n", 3, "--seed", seed))
            pages.append(
                (world / "out/compare.html").read_text().replace(server.url.split("/")[2], "")
            )
    assert pages[0] == pages[1] != pages[2]


def test_a_prompt_beyond_the_context_fails_alone(world, models):
    write_questions(
        world / "questions.json", [(["note.png"], "long " * 400, "x"), (["note.png"], "short", "x")]
    )
    with Server() as server:
        done = ask(world, f"Ours={models / 'ours'}", f"G={server.url}#m", code=1)
    assert (
        "1 texts are missing" in done.stderr
        and "positions end at 256" in (world / "out/compare.html").read_text()
        and len(lines_of(world)) == 3
    )


def test_what_a_system_says_is_text_and_nothing_else(world):
    visibly_evil = (
        "<script>alert(1)</script><img src=x onerror=alert(1)> | "
        "![x](http://evil.example/p.png) **b** `c`\n# h"
    )
    evil = visibly_evil + "\x00 \ud800 \x1b[31m"
    write_questions(
        world / "questions.json",
        [(["note.png"], "<b>q</b> | <image>".replace("<image>", ""), "<i>t</i>")],
    )
    with Server(lambda n, question: evil) as server:
        ask(world, f"<u>G</u>|={server.url}#<s>m</s>")
        ask(world, f"<u>G</u>|={server.url}#<s>m</s>", f"H={server.url}#h", more=("--blind",))
    for name in ("compare.html", "blind.html"):
        page = Page(world / "out" / name)
        text = (world / "out" / name).read_bytes().decode()
        assert Counter(tag for tag, _ in page.tags)["script"] == (name == "blind.html") and not {
            "u",
            "s",
            "i",
        } & {tag for tag, _ in page.tags}
        assert [
            attributes
            for tag, attributes in page.tags
            if tag == "img" and not attributes["src"].startswith("data:image/jpeg")
        ] == []
        assert any(visibly_evil in shown for shown in page.texts)
        assert "\0" not in text and "\x1b" not in text and "<b>q" not in text
    markdown = (world / "out/compare.md").read_text()
    assert (
        "<script" not in markdown
        and "![x]" not in markdown
        and r"\*\*b\*\*" in markdown
        and "\x1b" not in markdown
    )
    assert all(
        len(re.findall(r"(?<!\\)\|", line)) == 3
        for line in markdown.splitlines()
        if line.startswith("|") and "---" not in line
    )


@pytest.mark.parametrize(
    "name, write",
    [
        ("bomb", lambda path: Image.new("1", (12000, 12000)).save(path, "PNG")),
        ("empty", lambda path: path.write_bytes(b"")),
        ("truncated", lambda path: path.write_bytes(path.read_bytes()[:300])),
        ("gone", lambda path: path.unlink()),
    ],
)
def test_a_bad_picture_stops_before_anything_is_asked(world, name, write):
    write(world / "images/note.png")
    with Server() as server:
        done = ask(world, f"G={server.url}#m", code=2)
        assert not server.requests
    line = done.stderr.strip().splitlines()[-1]
    assert (
        "questions.json" in line
        and ("id-1" in line or "row 1" in line)
        and "note.png" in line
        and "Traceback" not in done.stderr
    )
    with Server() as server:
        assert (
            "left out" in ask(world, f"G={server.url}#m", more=("--skip-bad",)).stderr
            and len(server.requests) == 5
        )


@pytest.mark.parametrize("question", ["a\0b", "a\ud800b"])
def test_a_question_that_is_no_text_is_refused(world, question):
    write_questions(
        world / "questions.json", [(["note.png"], "fine", "x"), (["note.png"], question, "x")]
    )
    done = ask(world, "G=http://127.0.0.1:9/v1#m", code=2)
    assert (
        done.stderr.strip().count("\n") == 0
        and ("id-1" in done.stderr or "row 1" in done.stderr)
        and "questions.json" in done.stderr
    )
    questions = [Question("7", [{"from": "human", "value": question}], "x", [])]
    with pytest.raises(ValueError, match="question 7"):
        compare.choose_questions(questions, file="f", ids=None, n=1, seed=0, skip_bad=False)


@pytest.mark.parametrize(
    "systems, words",
    [
        (["G"], "NAME=FOLDER"),
        (["=x"], "NAME=FOLDER"),
        (["G=https://host/v1"], "model-name"),
        (["G=gone"], "gone"),
        (["G=https:///v1#m"], "G: --base-url"),
        (["G=https://u:secret@host/v1#m"], "password"),
        (["G=http://h/v1#a", "G=http://h/v1#b"], "two systems"),
        (["G={images}"], "config.json"),
    ],
)
def test_a_bad_system_is_one_line(world, systems, words):
    done = ask(world, *(system.format(images=world / "images") for system in systems), code=2)
    assert (
        words in done.stderr
        and done.stderr.strip().count("\n") == 0
        and "secret" not in done.stderr
        and not (world / "out").exists()
    )


def test_gloss(world):
    """English beneath each Chinese text, asked for once each, kept; a gloss that is not English is
    asked for again."""

    def behave(n, question):
        return "中文" if n == 0 and question == "肿块" else f"english-{question.encode().hex()[:8]}"

    with Server(lambda n, question: "肿块") as server, Server(behave) as glosser:
        more = ("--gloss", "--base-url", glosser.url, "--model", "g")
        done = ask(world, f"G={server.url}#m", more=more)
        assert done.stderr.count("will be sent to") == 2 and "for English beneath" in done.stderr
        texts = {
            "图中有什么",
            "病灶在哪里",
            "两张图相同吗",
            "什么是结节",
            "有几个病灶",
            "肿块",
            "左肺",
            "不同",
            "小的病灶",
            "一个",
        }
        assert glosser.counts == {text: 1 + (text == "肿块") for text in texts}
        assert "image_url" not in json.dumps(glosser.requests)
        page, markdown = (
            (world / "out/compare.html").read_text(),
            (world / "out/compare.md").read_text(),
        )
        assert (
            page.count('class="en">english-' + "肿块".encode().hex()[:8]) == 7
            and "<sub>english-" in markdown
        )
        done = ask(world, f"G={server.url}#m", more=more)
        assert (
            sum(glosser.counts.values()) == 11
            and "will be sent" not in done.stderr
            and (world / "out/compare.html").read_text() == page
        )
    with Server(lambda n, question: 400) as glosser:
        done = ask(
            world,
            f"G={server.url}#m",
            more=("--gloss", "--base-url", glosser.url, "--model", "other"),
            code=1,
        )
        assert (
            "gloss: status 400" in done.stderr
            and "肿块" in (world / "out/compare.html").read_text()
        )


# --- 2. blind ranking -----------------------------------------------------------------------------


def test_the_blind_page_names_nobody(world, models):
    """No name, path, address or model in the page, though an answer gave one away; the key says
    which answer is whose, and orders differ between questions."""
    with Server(lambda n, question: f"As SecretBot-7, I see {question}") as server:
        systems = (
            f"Secretours={models / 'ours'}",
            f"Secretllava={models / 'llava'}",
            f"SecretVision={server.url}#vendor/secretbot-7",
        )
        done = ask(world, *systems, more=("--blind",))
        first = (world / "out/blind.html").read_bytes()
        ask(world, *systems[::-1], more=("--blind",))
        assert (world / "out/blind.html").read_bytes() == first  # whatever the order of the systems
    text, page, key = (
        first.decode(),
        Page(world / "out/blind.html"),
        json.loads((world / "out/blind_key.json").read_text()),
    )
    for word in ("secret", str(models), "127.0.0.1", "vendor", "llava", "ours=", "id-0", "http"):
        assert word not in re.sub('base64,[^"]*', "", text).lower(), word
    assert "6 answers named a system" in done.stdout and not (world / "out/compare.html").exists()
    answers = {(line["system"], line["id"]): line["text"] for line in lines_of(world)}
    boxes = [
        (attributes["data-question"], attributes["data-label"])
        for tag, attributes in page.tags
        if attributes.get("class") == "answer"
    ]
    assert len(boxes) == 18
    shown = re.findall(r'data-label="(\w)"><b>\w</b><div class="text">(.*?)</div>', text, re.DOTALL)
    for (number, label), (again, box) in zip(boxes, shown, strict=True):
        entry = key["questions"][number]
        want = answers[entry["labels"][label], entry["id"]].replace("SecretBot-7", "▇▇▇")
        assert label == again and html_text(want, {})[18:-6] in box
    assert len({tuple(entry["labels"].values()) for entry in key["questions"].values()}) > 1
    assert [attributes for tag, attributes in page.tags if tag == "select"] == [
        {}
    ] * 18 and page.tags.count(("details", {})) == 6
    with Server() as server:  # another run leaves the older key where its rankings find it
        ask(world, f"A={server.url}#a", f"B={server.url}#b", more=("--blind",))
    assert json.loads((world / f"out/blind_key-{key['stamp']}.json").read_text()) == key and set(
        read_keys(world / "out")
    ) > {key["stamp"]}


def test_a_system_without_an_answer_is_not_ranked(world):
    with Server(lambda n, question: 400 if "几" in question else "x") as server, Server() as other:
        done = ask(world, f"Aaa={server.url}#m", f"Bbb={other.url}#m", more=("--blind",), code=1)
    assert (
        "5 questions for the doctors (1 with fewer" in done.stdout
        and "status 400" not in (world / "out/blind.html").read_text()
    )
    assert "two at least" in ask(world, f"A={other.url}#m", more=("--blind",), code=2).stderr


KEY = {
    "stamp": "s12e4",
    "systems": ["X", "Y", "Z"],
    "questions": {
        "q1": {"id": 1, "labels": {"A": "X", "B": "Y", "C": "Z"}},
        "q2": {"id": 2, "labels": {"A": "Y", "B": "Z", "C": "X"}},
        "q3": {"id": 3, "labels": {"A": "Z", "B": "X"}},
    },
}  # Y had no answer to the third
ONE = [
    ["q1", "A", 1],
    ["q1", "B", 2],
    ["q1", "C", 3],
    ["q2", "A", 1],
    ["q2", "B", 3],
    ["q2", "C", 1],
    ["q3", "A", 1],
    ["q3", "B", 2],
]
OTHER = [
    ["q1", "A", 2],
    ["q1", "B", 1],
    ["q1", "C", 3],
    ["q2", "A", 2],
    ["q2", "B", ""],
    ["q2", "C", 1],
    ["q3", "A", 1],
    ["q3", "B", 1],
]


def write_ranking(path, rows, rater, encoding="utf-8-sig", stamp="s12e4", **form):
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file, **form).writerows(
            [
                RANKING_COLUMNS,
                *(
                    [stamp, question, label, rank, note, rater]
                    for question, label, rank, *more in rows
                    for note in (more or [""])
                ),
            ]
        )
    return path


@pytest.fixture
def ranked(tmp_path):
    (tmp_path / "blind_key.json").write_text(json.dumps(KEY))
    return (
        tmp_path,
        write_ranking(tmp_path / "one.csv", ONE, "王"),
        write_ranking(tmp_path / "other.csv", OTHER, "李"),
    )


def test_ranks_are_counted_by_hand(ranked):
    """Three systems, two raters, three questions, with ties, a gap, and a system missing; each
    number below was worked out on paper."""
    folder, *files = ranked
    done = run("rank", folder, *files, code=0)
    result = json.loads((folder / "rank.json").read_text())
    assert (result["questions"], result["raters"], result["rankings"]) == (3, 2, 6) and (
        folder / "rank.md"
    ).read_text() == done.stdout
    rank, first = (
        {name: own[what] for name, own in result["systems"].items()} for what in ("rank", "first")
    )
    assert {name: own["mean"] for name, own in rank.items()} == {
        "X": 1.5,
        "Y": 1.5,
        "Z": 3.0,
    }  # q1 (1 + 2) / 2, q2 1.5: ties share places 1 and 2
    assert {name: own["mean"] for name, own in first.items()} == {
        "X": 0.5,
        "Y": 0.5,
        "Z": 0.0,
    } and {(own["questions"], own["ratings"]) for own in first.values()} == {(2, 3)}
    assert rank["Z"]["low"] is None and [first["Z"]["low"], first["Z"]["high"]] == pytest.approx(
        wilson(0, 2)
    )
    wins = {own["system"] + own["against"]: own for own in result["wins"]}
    assert {
        pair: (own["mean"], own["questions"], own["ratings"]) for pair, own in wins.items()
    } == {"XY": (0.625, 2, 4), "XZ": (0.75, 3, 5), "YZ": (1.0, 2, 3)}
    assert [(wins[pair]["low"], wins[pair]["high"]) for pair in ("XY", "XZ")] == [
        (0.5, 0.75),
        (0.25, 1.0),
    ]  # of 27 draws of 3, one is .25 three times: 3.7 %
    assert [wins["YZ"]["low"], wins["YZ"]["high"]] == pytest.approx(wilson(2, 2))
    assert result["agreement"] == {
        "pairs_of_raters": 1,
        "pairs_of_answers": 5,
        "tau_b": 0.25,
        "same_order": 0.4,
    }  # (-1 + 1 + 1) / sqrt(4 x 4); 2 of 5
    assert "| X | Z | 75.0% | 25.0% to 100.0% | 3 questions, 5 ratings |" in done.stdout
    again = run("rank", folder, *files[::-1], code=0)
    assert again.stdout == done.stdout


def test_the_interval_is_over_questions_not_over_ratings():
    """Ten raters who agree about two questions are no more than two questions: copies of a rating
    do not narrow the interval."""
    few, many = (
        {question: [value] * n for question, value in (("a", 1.0), ("b", 0.0), ("c", 1.0))}
        for n in (1, 10)
    )
    few, many = interval(few), interval(many)
    assert (few.low, few.high) == (many.low, many.high) == (0.0, 1.0)
    assert many.ratings == 30


@pytest.mark.parametrize(
    "form", ["bare", "semicolons", "gbk", "tabs", "decimals", "shuffled", "lines"]
)
def test_what_a_spreadsheet_makes_of_it(ranked, form):
    folder, one, other = ranked
    want = run("rank", folder, one, other, code=0).stdout
    rows = (
        [[question.upper(), label.lower(), f"{rank}.0"] for question, label, rank in ONE]
        if form == "decimals"
        else [[*row, "好, 很好"] for row in ONE]
    )
    options = {
        "bare": dict(encoding="utf-8", lineterminator="\n"),
        "semicolons": dict(delimiter=";"),
        "gbk": dict(encoding="gbk"),
        "tabs": dict(encoding="utf-16", delimiter="\t"),
        "decimals": {},
        "shuffled": dict(quoting=csv.QUOTE_ALL),
        "lines": {},
    }[form]
    write_ranking(one, rows[::-1] if form == "shuffled" else rows, "王", **options)
    if form == "lines":
        one.write_bytes(one.read_bytes() + b",,,,,\r\n\r\n")
    assert run("rank", folder, one, other, code=0).stdout == want
    notes = json.loads((folder / "rank.json").read_text())["notes"]
    assert form == "decimals" or (
        len(notes) == 8 and notes[0]["note"] == "好, 很好" and notes[0]["rater"] == "王"
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.replace("s12e4", "s9", 1), "row 2: sample 's9'"),
        (lambda t: t.replace("s12e4", "1.2E+05"), "row 2: sample"),
        (
            lambda t: t.replace("q1,B,2", "q7,B,2"),
            "row 3: the page has no answer 'B' of question 'q7'",
        ),
        (lambda t: t.replace("q3,B,2", "q3,C,2"), "row 9: the page has no answer"),
        (lambda t: t.replace("q1,C,3", "q1,C,4"), "row 4: rank '4'"),
        (lambda t: t.replace("q1,C,3", "q1,C,0"), "row 4: rank '0'"),
        (lambda t: t.replace("q1,C,3", "q1,C,best"), "row 4: rank 'best'"),
        (lambda t: t.replace("q1,C,3", "q1,C,1.5"), "row 4: rank '1.5'"),
        (lambda t: t.replace("\u738b", "", 1), "row 2: no rater"),
        (lambda t: t + "s12e4,q1,A,2,,\u738b\r\n", "row 10: \u738b gave this answer rank 1 before"),
        (lambda t: t.replace("rank", "place"), "no column 'rank'"),
        (lambda t: "", "not a ranking"),
        (lambda t: t + "s12e4,q1\r\n", "row 10: it ends before 'label'"),
        (lambda t: re.sub(r",\d,", ",,", t), "nobody ranked"),
        (lambda t: t.split("\r\n")[0], "nobody ranked"),
    ],
)
def test_a_broken_ranking_is_one_line(ranked, change, words):
    folder, one, _ = ranked
    one.write_bytes(change(one.read_bytes().decode("utf-8-sig")).encode())
    done = run("rank", folder, one, code=2)
    assert (
        words in done.stderr
        and "one.csv" in done.stderr
        and done.stderr.strip().count("\n") == 0
        and not (folder / "rank.json").exists()
    )


def test_bad_usage_of_rank_is_one_line(ranked):
    folder, one, _ = ranked
    (folder / "noise.csv").write_bytes(b"\x81\xff\x00\xfe" * 20)
    for words, said in (
        ((folder, folder / "gone.csv"), "no such ranking"),
        ((folder / "gone", one), "no blind_key.json"),
        ((folder, folder / "noise.csv"), "noise.csv"),
    ):
        done = run("rank", *words, code=2)
        assert said in done.stderr and done.stderr.strip().count("\n") == 0
    (folder / "blind_key.json").write_text("[]")
    assert "not a key" in run("rank", folder, one, code=2).stderr


def test_a_doctor_ranks_in_a_browser(world):
    """Filled in and saved in a real browser, the table is what rank reads; a reload keeps what was
    filled in."""
    playwright = pytest.importorskip("playwright.sync_api")
    with Server() as server, Server(lambda n, question: "other") as other:
        ask(world, f"Aaa={server.url}#m", f"Bbb={other.url}#m", more=("--blind",))
    with playwright.sync_playwright() as browsers:
        try:
            browser = browsers.chromium.launch(
                executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
                args=["--no-sandbox"],
            )
        except Exception as error:
            pytest.skip(f"no chromium: {str(error)[:80]}")
        page = browser.new_page()
        page.goto((world / "out/blind.html").as_uri())
        assert page.locator("select").first.is_disabled()
        page.fill("#rater", "Dr. \u738b")
        page.locator("#rater").dispatch_event("change")
        for k in range(12):
            page.locator("select").nth(k).select_option(str(1 + k % 2))
        page.locator(".answer input").first.fill('said "so", then')
        page.reload()
        assert (
            page.locator("select").nth(1).input_value() == "2"
            and page.locator("article.done").count() == 6
        )
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(world / "ranking.csv")
        browser.close()
    run("rank", world / "out", world / "ranking.csv", code=0)
    result = json.loads((world / "out/rank.json").read_text())
    assert result["rankings"] == 6 and result["notes"][0]["note"] == 'said "so", then'
