"""Run by test_train.py under torchrun: what CUDA does (bf16 compute, float32 trained and bf16
frozen parameters, recomputed layers), on CPU.

Prints for both stages the largest relative difference of gradients from float32, and checks dtypes;
a rank without pictures takes part.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import train
from model_io.load import read_checkpoint
from model_io.tokens import Tokenizer
from model_io.weights import load_weights
from qilin_min import Qilin
from training.ranks import setup_distributed

toy = Path(sys.argv[1])
rank, world_size, device = setup_distributed()
worst = 0.0
for stage in (1, 2):
    settings = train.read_settings(
        [
            "--stage",
            str(stage),
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
    checkpoint = read_checkpoint(llm=settings.llm, vision=settings.vision, projector="fresh")
    config = checkpoint.config
    data = train.open_dialogs(settings, [toy / "mixed.json"], Tokenizer(settings.llm), config)
    batch = data[[0, 1, 2] if rank == 0 else [len(data) - 3, len(data) - 4]]  # rank 1: text only
    n_targets = train.sum_over_ranks(train.count([batch]), device)["targets"]
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            model = Qilin(config)
        model = train.shard_model(model, device, train.STAGES[stage].trained, dtype)
        load_weights(model, checkpoint.sources, device, checkpoint.is_fresh)
        model.model.n_checkpointed = config.text.num_hidden_layers
        model.train()
        assert all(
            p.dtype == (torch.float32 if p.requires_grad else dtype) for p in model.parameters()
        )
        (
            model(**train.to_device(batch, device), reduction="sum") / n_targets * world_size
        ).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)
        gradients.append(torch.cat([p.grad.full_tensor().flatten() for p in trained]))
    worst = max(worst, float((gradients[1] - gradients[0]).norm() / gradients[0].norm()))
if rank == 0:
    print(worst)
dist.destroy_process_group()
