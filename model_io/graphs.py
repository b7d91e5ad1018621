"""Decoding on CUDA: the kernels of one token a row captured as a CUDA graph, launched at once.

in: a model's decode(), step after step over one KVCache
out: the same logits

At batch 1 a step of 13B is about 1,200 kernels (counted): launching them one by one takes the host
longer than the GPU needs to run them (computed).
"""

import sys
import weakref
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.files import one_line
from qilin_min import KVCache, Qilin

# steps over a cache that are launched kernel by kernel before one is captured: capturing costs the
# time of several (computed), which an answer of one letter never gets back
N_EAGER_STEPS = 8
# kernels of attention that take any length as it comes. On Hopper and Blackwell torch asks cuDNN
# first (read in 2.11 to 2.13), which makes a plan for each length that it has not seen, 23 to 37 ms
# (seen by others), and each word of an answer brings one
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# a captured step attends to a multiple of this many positions, those not held yet masked: more is
# read for nothing, fewer is captured anew more often
POSITIONS = 256


class CapturedStep:
    """model.decode() over one cache as a CUDA graph that attends to n_positions of it."""

    def __init__(
        self,
        model: Qilin,
        ids: Tensor,
        cache: KVCache,
        lengths: Tensor,
        n_positions: int,
        stream: torch.cuda.Stream,
    ):
        """Capture, on that stream, what decode() launches; nothing is computed, and the cache stays
        as it is.

        RuntimeError where something in it cannot be captured.
        """
        self.n_positions = n_positions
        # what the graph reads: a replay finds its own inputs there
        self.ids = ids.clone()
        self.lengths = lengths.clone()
        self.graph = torch.cuda.CUDAGraph()
        held = cache.n_positions
        # decode() counts one more
        cache.n_positions = n_positions - 1
        try:
            # other threads may use the GPU meanwhile, which need not be the current one
            with (
                torch.cuda.device(ids.device),
                torch.cuda.graph(
                    self.graph,
                    stream=stream,
                    capture_error_mode="thread_local",
                ),
            ):
                self.logits = Qilin.decode(model, self.ids, cache, self.lengths)  # (B, V)
        finally:
            cache.n_positions = held

    def replay(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits float32 (B, V), which the next replay overwrites."""
        self.ids.copy_(ids)
        self.lengths.copy_(lengths)
        self.graph.replay()
        return self.logits


class GraphDecoder:
    """In the place of a model's decode(): captures its step once an answer is long enough."""

    def __init__(self, model: Qilin):
        # the model holds this, and must be freed without waiting for the garbage collector
        self.model = cast(Qilin, weakref.proxy(model))
        # a graph reads and writes the tensors of one cache, and goes with it
        self.n_steps: weakref.WeakKeyDictionary[KVCache, int] = weakref.WeakKeyDictionary()
        self.captured: weakref.WeakKeyDictionary[KVCache, CapturedStep] = (
            weakref.WeakKeyDictionary()
        )
        # one for all captures: cuBLAS keeps what it works in for each stream that there ever was
        self.stream: torch.cuda.Stream | None = None
        # why no step is captured any more
        self.trouble: str | None = None

    def __call__(self, ids: Tensor, cache: KVCache, lengths: Tensor) -> Tensor:
        """Logits float32 (B, V): ids, cache and lengths as of Qilin.decode."""
        with sdpa_kernel(WITHOUT_PLANS):
            return self.step(ids, cache, lengths)

    def step(self, ids: Tensor, cache: KVCache, lengths: Tensor) -> Tensor:
        """The same, with the kernels of attention that torch chooses."""
        n_positions = min(cache.n_positions + 1, cache.max_length)
        step = self.captured.get(cache)
        if step is not None and n_positions <= step.n_positions:
            cache.n_positions = n_positions
            return step.replay(ids, lengths)
        self.n_steps[cache] = self.n_steps.get(cache, 0) + 1
        is_short = self.n_steps[cache] <= N_EAGER_STEPS
        if is_short or torch.is_grad_enabled() or self.trouble is not None:
            return Qilin.decode(self.model, ids, cache, lengths)

        n_captured = min(-(-n_positions // POSITIONS) * POSITIONS, cache.max_length)
        # computed once in the shapes that are captured: kernels are chosen, code is compiled and
        # workspaces are made at first use, none of which a graph can hold
        cache.n_positions = n_captured - 1
        logits = Qilin.decode(self.model, ids, cache, lengths)
        cache.n_positions = n_positions
        try:
            if self.stream is None:
                self.stream = torch.cuda.Stream(ids.device)
            self.captured[cache] = CapturedStep(
                self.model, ids, cache, lengths, n_captured, self.stream
            )
        # the second of a device that has no graphs
        except (RuntimeError, ValueError) as error:
            self.trouble = one_line(error)[:200]
            print(
                f"a step cannot be captured as a CUDA graph ({self.trouble}): answers come kernel "
                "by kernel",
                file=sys.stderr,
            )
        return logits


def capture_decoding(model: Qilin) -> None:
    """From now on generate() captures the model's steps. For a model that lies on one GPU."""
    model.__dict__["decode"] = GraphDecoder(model)


def launch_singly(model: Qilin) -> None:
    """Undo capture_decoding()."""
    model.__dict__.pop("decode", None)
