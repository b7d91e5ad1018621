"""Run by test_plan.py: a training step of the real model, sharding, loss, clipping, optimiser,
checkpoint and export under a watch for storages and collectives. Prints JSON: peak bytes of a rank
by phase, collectives and their bytes by phase, bytes that a checkpoint copies to the host.

    python tests/tools/measure_step.py fake STAGE SIZE ROWS TOKENS CHECKPOINTED KEPT MICRO_BATCHES
        a rank of 8 of a model of 7B or 13B, fake tensors, bf16 compute
    torchrun --nproc_per_node 2 tests/tools/measure_step.py real STAGE ROWS TOKENS CHECKPOINTED \
        KEPT MICRO_BATCHES
        a small model on real tensors, float32

The watch cannot see into a kernel, nor do fake tensors hold values that could be counted.
"""

import json
import os
import sys
import weakref
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qilin_min as q
import train
from model_io.export import full_tensors
from training.checkpoints import Checkpoints
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


def start(is_fake, size):
    """Joins the ranks, or plays one of 8. -> the model's config."""
    if is_fake:
        dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
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


class Watch(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still held, and collectives.

    phase: the name under which the peak and the collectives of what runs now are noted.
    """

    def __init__(self):
        super().__init__()
        self.phase = "before"
        self.held: dict[int, int] = {}  # address of a storage: its bytes
        self.n_held = 0
        self.peaks: dict[str, int] = defaultdict(int)
        self.collectives: dict[str, dict[str, list[int]]] = defaultdict(dict)

    def __enter__(self):
        # how FSDP frees what it gathered, past every dispatcher
        resize = torch.UntypedStorage.resize_
        self.resize = resize

        def resize_and_note(storage, size):
            resize(storage, size)
            self.note(storage)

        torch.UntypedStorage.resize_ = resize_and_note
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def note(self, storage):
        address = storage._cdata
        if address not in self.held:
            self.held[address] = 0
            weakref.finalize(storage, self.forget, address)
        self.n_held += storage.nbytes() - self.held[address]
        self.held[address] = storage.nbytes()
        self.peaks[self.phase] = max(self.peaks[self.phase], self.n_held)

    def forget(self, address):
        self.n_held -= self.held.pop(address)

    def enter(self, phase):
        """What runs from here on is of this phase, and holds what is held now."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks[phase], self.n_held)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            # first into the operations on this rank's own rows
            return NotImplemented
        if func is torch.ops._c10d_functional.wait_tensor.default:
            # gives what it was given; of fake tensors a copy
            return args[0]
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor in made:
            self.note(tensor.untyped_storage())
        if func.namespace in ("c10d", "_c10d_functional"):
            given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.count(func.__name__.split(".")[0].strip("_"), made + given)
        return out

    def count(self, name, tensors):
        """One more collective, its bytes being those of its larger side."""
        counted = self.collectives[self.phase].setdefault(name, [0, 0])
        counted[0] += 1
        counted[1] += max(tensor.nbytes for tensor in tensors)


def micro_batch(config, rows, tokens):
    ids = torch.ones(rows, tokens, dtype=torch.int64)
    ids[:, : config.n_image_tokens] = q.IMAGE_TOKEN_INDEX
    labels = ids.clone()
    labels[:, :-N_LABELS] = q.IGNORE_INDEX
    size = config.vision.image_size
    return dict(
        input_ids=ids,
        labels=labels,
        pixel_values=torch.zeros(rows, 3, size, size),
        n_image_positions=rows * config.n_image_tokens,
        n_labels=rows * N_LABELS,
    )


def one_step(watch, model, parts, n_checkpointed):
    """As train() takes it -> bytes that a checkpoint copies to the host. An idle one before gives
    Adam its moments, and DTensor its shapes, which it finds out on whole tensors of its own."""
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = train.build_optimizer(model, lr=1e-3, weight_decay=0.0)
    run: Any = SimpleNamespace(
        model=model,
        device=torch.device("cpu"),
        cut=SimpleNamespace(n_checkpointed=lambda slots: n_checkpointed),
    )
    model.register_forward_pre_hook(lambda *_: watch.enter("forward"), prepend=True)
    model.register_forward_hook(lambda *_: watch.enter("backward"))
    for param in trained:
        param.grad = torch.zeros_like(param)
    for is_idle in (True, False):
        if not is_idle:
            train.backward(run, parts, n_targets=1.0)
        watch.enter("idle" if is_idle else "clipping")
        torch.nn.utils.clip_grad_norm_(trained, 1.0).full_tensor()
        watch.enter("idle" if is_idle else "step")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    watch.enter("checkpoint")
    checkpoints: Any = SimpleNamespace(model=model, optimizer=optimizer)
    held = Checkpoints.tensors(checkpoints, with_rng=False)
    n_bytes = 0
    for leaf in tree_leaves(held):
        if isinstance(leaf, torch.Tensor):
            local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            n_bytes += local.nbytes
    del held
    for phase in ("idle", "export"):
        watch.enter(phase)
        for _, full in full_tensors(model, dtype=torch.bfloat16):
            del full
    watch.enter("after")
    return n_bytes


def main():
    is_fake = sys.argv[1] == "fake"
    stage = int(sys.argv[2])
    rows, tokens, n_checkpointed, is_kept, n_parts = map(int, sys.argv[-5:])
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
    watch = Watch()
    with FakeTensorMode(allow_non_fake_inputs=True) if is_fake else nullcontext(), watch:
        give_memory(model, is_fake)
        model.train()
        part = micro_batch(config, rows, tokens)
        copied = one_step(watch, model, [part] * n_parts, n_checkpointed)
    if dist.get_rank() == 0:
        found = dict(peaks=watch.peaks, collectives=watch.collectives, copied=copied)
        print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
