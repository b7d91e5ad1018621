"""Promise: what a step waits for when a checkpoint is written is one copy of what is trained: each
tensor is copied to the host once, and what is written is that copy."""

import threading

import torch
from conftest import make_qilin
from torch.utils._python_dispatch import TorchDispatchMode

import train
from training.checkpoints import Checkpoints, Progress
from training.ranks import setup_distributed

COPIES = ("aten.copy_", "aten.clone", "aten._to_copy")


class CountCopies(TorchDispatchMode):
    """Bytes that operations of this thread copy."""

    def __init__(self):
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(COPIES):
            self.n_bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def test_each_tensor_is_copied_once(tmp_path, monkeypatch):
    setup_distributed()
    model = train.shard_model(
        make_qilin(), torch.device("cpu"), ("mm_projector", "llm"), torch.float32
    )
    optimizer = train.build_optimizer(model, lr=1e-3, weight_decay=0.0)
    checkpoints = Checkpoints(tmp_path, model, optimizer, {}, n_kept=1, bandwidth=1.0)
    # so that Adam's moments are there: the first call makes them
    held = checkpoints.tensors()
    n_trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    one = 12 * n_trained

    elsewhere = []
    clone = torch.Tensor.clone

    def counted_clone(tensor, *args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            elsewhere.append(tensor.nbytes)
        return clone(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "clone", counted_clone)
    with CountCopies() as copies:
        checkpoints.save(Progress(step=1))
    # the writer's thread
    checkpoints.finish()
    assert one <= copies.n_bytes < 1.02 * one + 10_000
    assert sum(elsewhere) < 0.02 * one

    # and it is a copy: what training does meanwhile is not in it
    weights = {name: value.full_tensor().clone() for name, value in held["model"].items()}
    checkpoints.save(Progress(step=2))
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.zero_()
    checkpoints.finish()
    checkpoints.load(tmp_path / "checkpoints/step-2", with_rng=False)
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert torch.equal(param.full_tensor(), weights[name]), name
