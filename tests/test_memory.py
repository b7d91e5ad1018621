"""Loading takes no more anonymous memory than the model and a little: 1.15 times its bytes alone,
1.25 times a rank's shard under FSDP.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import free_port, hf_clip, hf_llama
from safetensors.torch import save_file

import qilin_min as q
from common.files import write_json
from model_io.export import hf_configs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaMA of 1.2 GB in float32, in shards with an index; a small one and a CLIP beside it."""
    out = tmp_path_factory.mktemp("large")
    hf_clip().save_pretrained(out / "clip")
    hf_llama().save_pretrained(out / "small")
    text = q.TextConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=7,
        num_attention_heads=12,
    )
    with torch.device("meta"):
        shapes = {
            name: p.shape
            for name, p in q.Qilin(q.QilinConfig(text)).named_parameters()
            if q.part_of(name) == "llm"
        }
    (out / "llama").mkdir()
    files = {name: f"model-{i * 4 // len(shapes)}.safetensors" for i, name in enumerate(shapes)}
    for file in set(files.values()):
        save_file(
            {name: torch.full(shapes[name], 0.01) for name in shapes if files[name] == file},
            out / "llama" / file,
        )
    write_json(out / "llama/model.safetensors.index.json", {"weight_map": files})
    write_json(
        out / "llama/config.json",
        hf_configs(q.QilinConfig(text), 0, 32000, "float32")["config.json"]["text_config"],
    )
    assert sum(f.stat().st_size for f in (out / "llama").iterdir()) > 1.0e9
    return out


def measure(folder, dtype, ranks):
    command = (
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(ranks),
            "--master_port",
            str(free_port()),
        ]
        if ranks > 1
        else [sys.executable]
    )
    done = subprocess.run(
        [*command, ROOT / "tests/tools/measure_load.py", folder / "llama", folder / "clip", dtype],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_process(folder, dtype, report):
    """float32 as on disk: mapped, nearly nothing of its own. bfloat16: converted, itself and no
    float32 copy beside it.
    """
    (seen,) = measure(folder, dtype, 1)
    report(
        f"memory: anonymous at the peak of loading, over the model's bytes ({dtype})",
        seen["peak"] / seen["bytes"],
        0.15 if dtype == "float32" else 1.15,
    )
    assert (
        dtype == "float32" or seen["peak"] > 0.9 * seen["bytes"]
    )  # the measure sees what there is


@pytest.mark.parametrize("ranks", [2, 3] if os.environ.get("LONG") else [3])
def test_each_rank_holds_its_shard(folder, ranks, report):
    seen = measure(folder, "float32", ranks)
    assert sorted(s["rank"] for s in seen) == list(range(ranks)) and all(
        0.9 < s["bytes"] * ranks / sum(t["bytes"] for t in seen) < 1.1 for s in seen
    )
    report(
        f"memory: anonymous at the peak of loading, over a rank's shard ({ranks} ranks)",
        max(s["peak"] / s["bytes"] for s in seen),
        1.25,
    )
    assert min(s["peak"] / s["bytes"] for s in seen) > 0.9
