"""Run by test_memory.py, alone or under torchrun: loads a LLaMA folder and prints rank, anonymous
memory at its peak over that before, and the model's bytes here.

argv: llama folder, clip folder, dtype
"""

import json
import os
import re
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

import train
from model_io.load import load_qilin, read_checkpoint
from training.ranks import setup_distributed


def anonymous():
    """Bytes of this process's memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


class Peak:
    """Watches anonymous memory in a thread of its own, from start to stop."""

    def __init__(self):
        self.before = anonymous()
        self.highest = self.before
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def watch(self):
        while not self.done.wait(0.002):
            self.highest = max(self.highest, anonymous())

    def stop(self):
        """Bytes at the peak over those before."""
        self.done.set()
        self.thread.join()
        return max(self.highest, anonymous()) - self.before


def local(param):
    """What this rank holds of a parameter."""
    return param.detach().to_local() if hasattr(param, "to_local") else param.detach()


def loader_of(llm, vision, dtype):
    """A function that loads the model as train.py does under torchrun, else as everybody."""
    if "RANK" not in os.environ:
        return lambda: load_qilin(llm=llm, vision=vision, dtype=dtype)
    _, _, device = setup_distributed()
    settings = train.read_settings(
        ["--stage", "2", "--llm", llm, "--vision", vision, "--projector", "fresh"]
        + ["--dtype", "float32"]
    )
    checkpoint = read_checkpoint(llm=llm, vision=vision, projector="fresh")
    # FSDP's own set-up is not the model's
    small = read_checkpoint(llm=vision + "/../small", vision=vision, projector="fresh")
    train.build_model(settings, small, device)
    return lambda: train.build_model(settings, checkpoint, device)[0]


def main():
    llm, vision, dtype = sys.argv[1:]
    # what the first operation of a process sets up is not the model's
    torch.ones(64, 64) @ torch.ones(64, 64)
    load = loader_of(llm, vision, getattr(torch, dtype))
    peak = Peak()
    model = load()
    for param in model.parameters():
        # touched to the last page
        if local(param).numel():
            float(local(param).sum())
    seen = {
        "rank": int(os.environ.get("RANK", 0)),
        "peak": peak.stop(),
        "bytes": sum(local(param).nbytes for param in model.parameters()),
    }
    # at once, so that the lines of two ranks do not mix
    os.write(1, (json.dumps(seen) + "\n").encode())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
