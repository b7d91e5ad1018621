"""Run by test_train.py under torchrun: prints the largest relative difference between gradients of
the sharded and of the plain model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch.distributed as dist

import train
from model_io.load import load_qilin, read_checkpoint
from model_io.tokens import Tokenizer
from training.ranks import setup_distributed


def main():
    toy = Path(sys.argv[1])
    parts = ["--llm", str(toy / "llama"), "--vision", str(toy / "clip"), "--projector", "fresh"]
    parts += ["--images", str(toy / "images")]
    settings = train.read_settings(["--stage", "2", "--dtype", "float32", *parts])
    rank, world_size, device = setup_distributed()
    checkpoint = read_checkpoint(llm=settings.llm, vision=settings.vision, projector="fresh")
    data = train.open_dialogs(
        settings, [toy / "mixed.json"], Tokenizer(settings.llm), checkpoint.config
    )
    rows = list(range(len(data)))

    # one mean over all labelled tokens
    plain = load_qilin(llm=settings.llm, vision=settings.vision).train()
    plain(**train.to_device(data[rows], device), reduction="mean").backward()

    model, _ = train.build_model(settings, checkpoint, device)
    model.train()
    batches = [data[micro] for micro in train.cut_batch(rows, rank, world_size, 5)]
    n_targets = train.sum_over_ranks(train.count(batches))["targets"]
    for batch in batches:
        loss = model(**train.to_device(batch, device), reduction="sum") / n_targets
        (loss * world_size).backward()

    worst = 0.0
    for name, param in model.named_parameters():
        if param.requires_grad:
            got = param.grad.full_tensor()
            want = plain.get_parameter(name).grad
            worst = max(worst, float((got - want).norm() / want.norm()))
    if rank == 0:
        print(worst)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
