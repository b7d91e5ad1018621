"""Run by test_train.py under torchrun: what CUDA does (bf16 compute, float32 trained and bf16
frozen parameters, recomputed layers), on CPU.

Prints for both stages the largest relative difference of gradients from float32, and checks dtypes;
a rank without pictures takes part.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist

import train
from model_io.load import read_checkpoint
from model_io.tokens import Tokenizer
from model_io.weights import load_weights
from qilin_min import Qilin
from training.ranks import setup_distributed


def gradients_of(stage, checkpoint, dtype, batch, device):
    """All gradients of one step in one row, float32, of the whole batch of all ranks."""
    n_targets = train.sum_over_ranks(train.count([batch]))["targets"]
    with torch.device("meta"):
        model = Qilin(checkpoint.config)
    model = train.shard_model(model, device, train.STAGES[stage].trained, dtype)
    load_weights(model, checkpoint.sources, device, checkpoint.is_fresh)
    model.model.n_checkpointed = checkpoint.config.text.num_hidden_layers
    model.train()
    for param in model.parameters():
        assert param.dtype == (torch.float32 if param.requires_grad else dtype)
    loss = model(**train.to_device(batch, device), reduction="sum") / n_targets
    (loss * dist.get_world_size()).backward()
    trained = [param for param in model.parameters() if param.requires_grad]
    for param in trained:
        assert param.grad is not None and param.grad.dtype == torch.float32
    return torch.cat([param.grad.full_tensor().flatten() for param in trained])


def main():
    toy = Path(sys.argv[1])
    rank, _, device = setup_distributed()
    parts = ["--llm", str(toy / "llama"), "--vision", str(toy / "clip"), "--projector", "fresh"]
    parts += ["--images", str(toy / "images")]
    worst = 0.0
    for stage in (1, 2):
        settings = train.read_settings(["--stage", str(stage), *parts])
        checkpoint = read_checkpoint(llm=settings.llm, vision=settings.vision, projector="fresh")
        data = train.open_dialogs(
            settings, [toy / "mixed.json"], Tokenizer(settings.llm), checkpoint.config
        )
        # rank 1: text only
        batch = data[[0, 1, 2] if rank == 0 else [len(data) - 3, len(data) - 4]]
        exact = gradients_of(stage, checkpoint, torch.float32, batch, device)
        rounded = gradients_of(stage, checkpoint, torch.bfloat16, batch, device)
        worst = max(worst, float((rounded - exact).norm() / exact.norm()))
    if rank == 0:
        print(worst)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
