"""Commands as a user starts them: train.py --smoke, sample.py, serve.py."""

import base64
import importlib.util
import json
import os
import re
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from common.files import read_json
from gpu.processes import launch, on_device
from gpu.table import Context, Row
from gpu.world import toy_world, trained_model
from training.smoke import HERE, command_line

# of the last table that train.py --smoke prints: | check | result | figures |
SMOKE_ROW = re.compile(r"^\| ([^|]+) \| (pass|FAIL|skipped[^|]*) \| ([^|]*) \|$", re.M)


def smoke(context: Context) -> list[Row]:
    """A row for each of the smoke run's checks. It writes out/smoke of the current folder, which is
    the step's."""
    words = ["train.py", "--smoke", *on_device(context.device.type)]
    started = launch(context, "smoke", *words)
    # as long as the step may: finish() gives one run so long, and this one is seven
    started.process.wait()
    text = started.finish(codes=(0, 1))
    rows = []
    for name, result, figures in SMOKE_ROW.findall(text.split("|---|---|---|")[-1]):
        holds = {"pass": True, "FAIL": False}.get(result)
        rows.append(Row(f"train.py --smoke: {name}", "pass", f"{result}: {figures}", holds))
    if not rows:
        raise RuntimeError(f"no table in {started.log}")
    return rows


def serve(context: Context) -> list[Row]:
    """One question over HTTP, answered as sample.py answers it."""
    check = "serve.py's answer over HTTP"
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        return [Row(check, "sample.py's", f"skipped: pip install {' '.join(missing)}", None)]
    toy = toy_world(context)
    row = read_json(toy / "heldout.json")[0]
    question = row["conversations"][0]["value"].replace("<image>", "").strip()
    picture = toy / "images" / row["image"]
    model: list[object] = ["--model", trained_model(context), "--dtype", "float32"]
    model += ["--device", context.device.type]
    want = sampled(context, picture, question, model)

    server = launch(context, "serve", "serve.py", "--port", 0, *model)
    try:
        server.wait_for(lambda: address_in(server.log) is not None, "address")
        address = address_in(server.log)
        got = ask(f"{address}/v1/chat/completions", picture, question)
    finally:
        server.end()
    return [Row(check, f"sample.py's: {want!r}", repr(got), got == want != "")]


def sampled(context: Context, picture: Path, question: str, model: list[object]) -> str:
    """What sample.py says on stdout, where there is the answer and nothing else."""
    words = ("sample.py", picture, question, *model, "--max-new-tokens", 24)
    done = subprocess.run(
        command_line(words, ranks=0),
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    if done.returncode:
        raise RuntimeError(f"sample.py: exit code {done.returncode}: {done.stderr[-300:]}")
    return done.stdout.strip()


def address_in(log: Path) -> str | None:
    """Where a server says that it answers."""
    found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
    return found[0] if found else None


def ask(url: str, picture: Path, question: str) -> str:
    """The answer of an OpenAI-compatible endpoint; no proxy is asked."""
    data = base64.b64encode(picture.read_bytes()).decode()
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": question},
    ]
    body = {
        "model": "qilin",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 24,
    }
    request = urllib.request.Request(
        url, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as response:
        answer = json.load(response)
    return answer["choices"][0]["message"]["content"].strip()
