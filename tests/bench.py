"""Speed beside transformers, measured in turn in one run, as ratios: exit 1 where a goal is missed. Timings on a shared machine say nothing alone.

    python tests/bench.py load [--runs 7]      a LLaMA of 1 GB or more on disk until every parameter has been touched; imports excluded
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LOAD = {  # each in a process of its own; what is imported before the clock starts is what loading needs
    "qilin-min": """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
import qilin_min as q
tic = time.perf_counter()
model = q.load_qilin(llm=sys.argv[2], vision=sys.argv[3], dtype=getattr(torch, sys.argv[4]))""",
    "transformers": """
import sys, time, torch
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama
tic = time.perf_counter()
model = LlamaForCausalLM.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[4]))"""}
TOUCH = """
for p in model.parameters():
    float(p.detach().view(-1)[:: 4096 // p.element_size()].sum())  # one value of every page
print(time.perf_counter() - tic)"""


def bench_load(runs):
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        folder, missed = Path(folder), False
        CLIPVisionModel(CLIPVisionConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)).save_pretrained(folder / "clip")
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=8, num_attention_heads=16))
        for stored in ("float32", "bfloat16"):
            import torch
            model.to(getattr(torch, stored)).save_pretrained(folder / stored, max_shard_size="500MB")
        for stored, dtype in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")):
            seconds = {name: [] for name in LOAD}
            for run in range(runs + 1):
                for name in list(LOAD) if run % 2 else reversed(LOAD):
                    done = subprocess.run([sys.executable, "-c", LOAD[name] + TOUCH, ROOT, folder / stored, folder / "clip", dtype],
                                          capture_output=True, text=True, check=True, env=dict(os.environ, HF_HUB_OFFLINE="1"))
                    if run:  # the first round fills the page cache
                        seconds[name].append(float(done.stdout.split()[-1]))
            ratios = [a / b for a, b in zip(*seconds.values())]
            medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
            size = sum(f.stat().st_size for f in (folder / stored).glob("*.safetensors"))
            print(f"load {size / 1e9:.2f} GB {stored} as {dtype}: {json.dumps(medians)} s; ratio pair by pair: median {statistics.median(ratios):.2f}, "
                  f"{min(ratios):.2f} to {max(ratios):.2f} (goal: at most 1 when stored and loaded alike)", flush=True)
            missed |= stored == dtype and statistics.median(ratios) > 1.0
        return missed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load",))
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each (default %(default)s)")
    args = parser.parse_args()
    sys.exit(1 if bench_load(args.runs) else 0)


if __name__ == "__main__":
    main()
