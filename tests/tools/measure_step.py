"""Run by test_plan.py: one training step of the real model and sharding under a memory tracker; prints peak GiB of a rank, the unsharded tower left out.

    python tests/tools/measure_step.py fake STAGE SIZE ROWS TOKENS CHECKPOINTED KEPT        a rank of 8 of a model of 7B or 13B, fake tensors, bf16 compute
    torchrun --nproc_per_node 2 tests/tools/measure_step.py real STAGE ROWS TOKENS CHECKPOINTED KEPT   a small model on real tensors, float32

torch.distributed._tools is private to torch, so it stays in tests. It cannot see through fused AdamW, nor through values that decide shapes: under fake tensors
the loss takes the first positions instead of the labelled ones, as many, and splicing does not count pictures.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

import qilin_min as q
import train
from training.costs import GIB
from training.plan import LLAMA_SIZES, PAPER_TOWER

SMALL = dict(
    text=dict(
        vocab_size=4000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=4096,
    ),
    vision=dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    ),
)
N_LABELS = 64  # a row


def loss_of_first_positions(self, hidden, labels, reduction):
    """Qilin.loss but for the choice of positions."""
    n = hidden.shape[0] * N_LABELS
    hidden, targets = (
        hidden.reshape(-1, hidden.shape[-1])[torch.arange(n)],
        labels.reshape(-1)[torch.arange(n)],
    )
    total = hidden.float().sum() * 0.0
    for h, t in zip(hidden.split(q.LOSS_CHUNK), targets.split(q.LOSS_CHUNK)):
        total = total + q.checkpoint(
            lambda h, t: q.F.cross_entropy(self.logits(h), t, reduction="sum"),
            h,
            t,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total


def main():
    is_fake, stage = sys.argv[1] == "fake", int(sys.argv[2])
    rows, tokens, n_checkpointed, is_kept = map(int, sys.argv[-4:])
    if is_fake:
        dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
        config = q.QilinConfig(LLAMA_SIZES[sys.argv[3]], PAPER_TOWER)
        q.Qilin.loss = loss_of_first_positions
        q.splice_image_embeds = lambda x, embeds, mask: x.masked_scatter(
            mask[..., None], embeds.to(x.dtype)
        )
    else:
        dist.init_process_group("gloo")
        config = q.QilinConfig(q.TextConfig(**SMALL["text"]), q.VisionConfig(**SMALL["vision"]))
    with torch.device("meta"):
        model = q.Qilin(config)
    model = train.shard_model(
        model,
        torch.device("cpu"),
        train.STAGES[stage].trained,
        torch.bfloat16 if is_fake else torch.float32,
        is_kept=bool(is_kept),
    )
    model.model.n_checkpointed = n_checkpointed
    with FakeTensorMode(allow_non_fake_inputs=True) if is_fake else nullcontext():
        model._apply(lambda t: torch.empty_like(t, device="cpu"))
        if not is_fake:
            with torch.no_grad():
                for param in model.parameters():
                    (param.to_local() if hasattr(param, "to_local") else param).normal_(0, 0.02)
        model.train()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], foreach=False
        )
        tracker = FSDPMemTracker(model, optimizer)
        ids = torch.ones(rows, tokens, dtype=torch.int64)
        ids[:, : config.n_image_tokens] = q.IMAGE_TOKEN_INDEX
        labels = ids.clone()
        labels[:, :-N_LABELS] = q.IGNORE_INDEX
        pixels = torch.zeros(rows, 3, config.vision.image_size, config.vision.image_size)
        tracker.track_inputs((ids, labels, pixels))
        with tracker:
            for step in range(2):  # Adam's moments are there from the second on
                model(ids, pixels, labels, reduction="sum").backward()
                optimizer.step()
                optimizer.zero_grad()
                if step == 0:
                    tracker.reset_mod_stats()
    peak = tracker.get_tracker_snapshot("peak")
    if dist.get_rank() == 0:
        print(
            sum(
                parts[next(k for k in parts if str(k).endswith("Total"))] for parts in peak.values()
            )
            / GIB
        )
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
