"""Run by test_train.py under torchrun: prints the largest relative difference between gradients of
the sharded and of the plain model.
"""

import sys
from pathlib import Path

import torch.distributed as dist

import train
from model_io.load import load_qilin, read_checkpoint
from model_io.tokens import Tokenizer
from training.ranks import setup_distributed

toy = Path(sys.argv[1])
settings = train.read_settings(
    [
        "--stage",
        "2",
        "--llm",
        str(toy / "llama"),
        "--vision",
        str(toy / "clip"),
        "--projector",
        "fresh",
        "--images",
        str(toy / "images"),
    ]
)
rank, world_size, device = setup_distributed()
checkpoint = read_checkpoint(llm=settings.llm, vision=settings.vision, projector="fresh")
config = checkpoint.config
data = train.open_dialogs(settings, [toy / "mixed.json"], Tokenizer(settings.llm), config)

plain = load_qilin(llm=settings.llm, vision=settings.vision).train()
whole = data[list(range(len(data)))]
plain(
    **train.to_device(whole, device), reduction="mean"
).backward()  # one mean over all labelled tokens

model, _ = train.build_model(settings, checkpoint, device)
model.train()
micro_batches = train.cut_batch(list(range(len(data))), rank, world_size, 5)
parts = [data[micro] for micro in micro_batches]
n_targets = train.sum_over_ranks(train.count(parts), device)["targets"]
for batch in parts:
    (model(**train.to_device(batch, device), reduction="sum") / n_targets * world_size).backward()
worst = 0.0
for name, param in model.named_parameters():
    if param.requires_grad:
        got, want = param.grad.full_tensor(), plain.get_parameter(name).grad
        worst = max(worst, float((got - want).norm() / want.norm()))
if rank == 0:
    print(worst)
dist.destroy_process_group()
