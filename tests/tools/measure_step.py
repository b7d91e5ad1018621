"""Run by test_plan.py: one training step of the real model and sharding under a memory tracker;
prints peak GiB of a rank, the unsharded tower left out.

    python tests/tools/measure_step.py fake STAGE SIZE ROWS TOKENS CHECKPOINTED KEPT
        a rank of 8 of a model of 7B or 13B, fake tensors, bf16 compute
    torchrun --nproc_per_node 2 tests/tools/measure_step.py real STAGE ROWS TOKENS CHECKPOINTED KEPT
        a small model on real tensors, float32

torch.distributed._tools is private to torch, so it stays in tests. It cannot see through fused
AdamW, nor through values that decide shapes: under fake tensors the loss takes the first positions
instead of the labelled ones, as many, and splicing does not count pictures.
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
# of a row
N_LABELS = 64


def loss_of_first_positions(self, hidden, labels, reduction):
    """Qilin.loss but for the choice of positions."""
    first = torch.arange(hidden.shape[0] * N_LABELS)
    hidden = hidden.reshape(-1, hidden.shape[-1])[first]
    targets = labels.reshape(-1)[first]
    total = hidden.float().sum() * 0.0
    chunks = zip(hidden.split(q.LOSS_CHUNK), targets.split(q.LOSS_CHUNK), strict=True)
    for h, t in chunks:
        total = total + q.checkpoint(
            lambda h, t: q.F.cross_entropy(self.logits(h), t, reduction="sum"),
            h,
            t,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total


def splice_uncounted(x, embeds, mask):
    return x.masked_scatter(mask[..., None], embeds.to(x.dtype))


def start(is_fake, size):
    """Joins the ranks, or plays one of 8. -> the model's config."""
    if is_fake:
        dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
        q.Qilin.loss = loss_of_first_positions
        q.splice_image_embeds = splice_uncounted
        return q.QilinConfig(LLAMA_SIZES[size], PAPER_TOWER)
    dist.init_process_group("gloo")
    return q.QilinConfig(q.TextConfig(**SMALL["text"]), q.VisionConfig(**SMALL["vision"]))


def give_memory(model, is_fake):
    model._apply(lambda t: torch.empty_like(t, device="cpu"))
    if is_fake:
        return
    with torch.no_grad():
        for param in model.parameters():
            local = param.to_local() if hasattr(param, "to_local") else param
            local.normal_(0, 0.02)


def two_steps(model, config, rows, tokens):
    """The memory tracker that has seen the second of two steps: Adam's moments are there then."""
    model.train()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)
    tracker = FSDPMemTracker(model, optimizer)
    ids = torch.ones(rows, tokens, dtype=torch.int64)
    ids[:, : config.n_image_tokens] = q.IMAGE_TOKEN_INDEX
    labels = ids.clone()
    labels[:, :-N_LABELS] = q.IGNORE_INDEX
    pixels = torch.zeros(rows, 3, config.vision.image_size, config.vision.image_size)
    tracker.track_inputs((ids, labels, pixels))
    with tracker:
        for step in range(2):
            model(ids, pixels, labels, reduction="sum").backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                tracker.reset_mod_stats()
    return tracker


def peak_bytes(tracker):
    total = 0
    for parts in tracker.get_tracker_snapshot("peak").values():
        key = next(key for key in parts if str(key).endswith("Total"))
        total += parts[key]
    return total


def main():
    is_fake = sys.argv[1] == "fake"
    stage = int(sys.argv[2])
    rows, tokens, n_checkpointed, is_kept = map(int, sys.argv[-4:])
    config = start(is_fake, sys.argv[3])
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
        give_memory(model, is_fake)
        tracker = two_steps(model, config, rows, tokens)
    if dist.get_rank() == 0:
        print(peak_bytes(tracker) / GIB)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
