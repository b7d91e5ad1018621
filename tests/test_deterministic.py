"""Promise: --deterministic asks of torch all that makes a run on CUDA come to the same bits, no
operation of a training step lacks such a way, and on a CPU, which has no other, nothing changes."""

import os
import subprocess
import sys

import numpy as np
import torch
from conftest import IMG, ROOT, make_qilin, pictures, run, words
from torch.utils._python_dispatch import TorchDispatchMode

import qilin_min as q

# by the documentation of torch.use_deterministic_algorithms (2.11, 2.13): what raises there on CUDA
RAISING = {
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "max_unpool2d",
    "max_unpool3d",
    "upsample_linear1d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    # NLLLoss of pictures; of rows it is fine
    "nll_loss2d_forward",
    "_ctc_loss_backward",
    "_embedding_bag_dense_backward",
    "put_",
    "put",
    "histc",
    "bincount",
    "median",
    "kthvalue",
    "grid_sampler_2d_backward",
    "scatter_reduce",
    "scatter_reduce_",
    "index_reduce",
    "resize_",
}


class Recorded(TorchDispatchMode):
    """Names of the operations that run, and of the floating numbers that are summed up in rows."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "cumsum" and args[0].is_floating_point():
            name = "cumsum of floating numbers"
        self.names.add(name)
        return func(*args, **(kwargs or {}))


def test_no_operation_of_a_step_lacks_a_deterministic_way():
    """Both kinds of projector, several pictures, recomputation, clipping, AdamW."""
    recorded = Recorded()
    for projector_type in ("linear", "mlp2x_gelu"):
        model = make_qilin(projector_type).train()
        model.model.n_checkpointed = 1
        ids = q.pad_rows([[1] + IMG + words(9, 1) + IMG + words(3, 2), [1] + words(5, 3)], 0)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with recorded:
            model(ids, pictures(2), ids.clamp(min=-100)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert {"embedding_dense_backward", "nll_loss_backward"} <= recorded.names, recorded.names
    assert not recorded.names & (RAISING | {"cumsum of floating numbers"})


def test_a_run_on_a_cpu_is_the_same(toy, tmp_path):
    options = "--batch-size", 8, "--max-steps", 3
    plain = run(toy, tmp_path / "plain", *options)
    asked = run(toy, tmp_path / "asked", *options, "--deterministic")
    assert np.array_equal(plain, asked) and len(plain[0]) == 3
    weights = [tmp_path / name / "final/model.safetensors" for name in ("plain", "asked")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_is_asked_of_torch():
    """In a process of its own: all of it, before CUDA starts; what a user has set stays."""
    code = """
import os, torch
from training.ranks import make_deterministic
make_deterministic()
assert torch.are_deterministic_algorithms_enabled()
assert not torch.is_deterministic_algorithms_warn_only_enabled()
assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
assert not torch.cuda.is_initialized()
print(os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"])
"""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        environment.pop(name, None)
    said = []
    for more in ({}, {"NCCL_ALGO": "Ring"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, **more},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert said == [[":4096:8", "^NVLS"], [":4096:8", "Ring"]]
