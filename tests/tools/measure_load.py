"""Run by test_memory.py, alone or under torchrun: loads a LLaMA folder and prints rank, anonymous memory at its peak over that before, and the model's bytes here.

argv: llama folder, clip folder, dtype
"""

import json
import os
import re
import sys
import threading
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import train
from model_io.load import load_qilin, read_checkpoint
from training.ranks import setup_distributed


def anonymous():
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def watch(peak, done):
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())


llm, vision, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
torch.ones(64, 64) @ torch.ones(
    64, 64
)  # what the first operation of a process sets up is not the model's
if is_sharded := "RANK" in os.environ:
    rank, world_size, device = setup_distributed()
    args = train.parse_args(
        ["--stage", "2", "--llm", llm, "--vision", vision, "--projector", "fresh"]
    )
    checkpoint = read_checkpoint(llm=llm, vision=vision, projector="fresh")
    train.build_model(
        args, read_checkpoint(llm=vision + "/../small", vision=vision, projector="fresh"), device
    )  # FSDP's own set-up
before, done = anonymous(), threading.Event()
peak = [before]
thread = threading.Thread(target=watch, args=(peak, done))
thread.start()
model = (
    train.build_model(args, checkpoint, device)[0]
    if is_sharded
    else load_qilin(llm=llm, vision=vision, dtype=dtype)
)
for param in model.parameters():
    local = param.detach().to_local() if hasattr(param, "to_local") else param.detach()
    float(local.sum()) if local.numel() else None  # touched to the last page
done.set()
thread.join()
n_bytes = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in model.parameters())
os.write(
    1,
    (
        json.dumps(
            {
                "rank": int(os.environ.get("RANK", 0)),
                "peak": max(peak[0], anonymous()) - before,
                "bytes": n_bytes,
            }
        )
        + "\n"
    ).encode(),
)
if is_sharded:
    torch.distributed.destroy_process_group()
