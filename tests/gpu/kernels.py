"""Where a step's time goes, by the names of what ran: a profile -> seconds of each part.

On a GPU kernels are told apart by their names; what is hidden behind computing is not counted twice
and what nobody fills is waiting. On a CPU the same parts are found by the names of operators.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType

GEMM = "matrix products"
ATTENTION = "attention"
ELEMENTWISE = "element-wise"
OPTIMISER = "optimiser"
SHARDING = "collectives and their copies"
COPIES = "copies"
OTHER = "other"
WAITING = "waiting"
PARTS = (GEMM, ATTENTION, ELEMENTWISE, OPTIMISER, SHARDING, COPIES, OTHER)

# the first that matches counts: flash attention's names hold those of cutlass, its building blocks,
# and a kernel that inductor wrote is named after all that it fused
KERNELS = (
    (ATTENTION, r"flash|fmha|sdpa|attention"),
    (SHARDING, r"nccl|split_with_sizes|chunk_cat"),
    (COPIES, r"^Mem(cpy|set)"),
    (GEMM, r"^triton_tem_"),
    (ELEMENTWISE, r"^triton_"),
    (OPTIMISER, r"adam|lpnorm|multi_tensor_apply"),
    (GEMM, r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitK|convolve|fprop"),
    (
        ELEMENTWISE,
        r"elementwise|reduce_kernel|softmax|norm|GammaBeta|CatArray|index|gather|scatter|scan|embedding"
        r"|loss|fill|copy|sort|Radix|unique|arange|nonzero|cub::|where|silu",
    ),
)
# what computes or moves data inside the GPU for the step itself: what runs beside it is hidden
COMPUTING = (GEMM, ATTENTION, ELEMENTWISE, OPTIMISER, OTHER)

OPERATORS = (
    (ATTENTION, r"attention"),
    (SHARDING, r"c10d|fsdp|split_with_sizes|chunk_cat|gloo"),
    (OPTIMISER, r"adam|foreach|linalg_vector_norm"),
    (GEMM, r"aten::(mm|bmm|addmm|baddbmm|matmul|linear|_conv|convolution|mkldnn|thnn_conv)"),
    (
        ELEMENTWISE,
        r"aten::.*(mul|add|sub|div|neg|cat|silu|sigmoid|gelu|norm|softmax|pow|mean|sum|rsqrt|cos"
        r"|sin|to_copy|masked|index|where|fill|zero|embedding|nll|exp|copy_|eq|ne|slice|nonzero)",
    ),
)

Span = tuple[float, float]


def part_of_kernel(name: str, table: tuple[tuple[str, str], ...] = KERNELS) -> str:
    """The part of PARTS that a kernel, or an operator with table=OPERATORS, belongs to."""
    for part, pattern in table:
        if re.search(pattern, name, re.IGNORECASE):
            return part
    return OTHER


def covered(spans: Iterable[Span]) -> float:
    """Length of the union of (start, end)."""
    total = 0.0
    reached = float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@dataclass
class Profile:
    """What one step is made of."""

    seconds: float
    # of each of PARTS: how long its kernels ran, beside others or not
    parts: dict[str, float]
    # nothing that computes ran: all of it, and that of it in which something was copied or sent
    exposed: float
    waiting: float
    # names of the kernels that attend, and of those that no pattern knows
    attention: list[str]
    unknown: list[str]

    def share(self, part: str) -> float:
        seconds = self.waiting if part == WAITING else self.parts[part]
        return seconds / self.seconds


def profile_of_kernels(kernels: list[tuple[str, float, float]], seconds: float) -> Profile:
    """kernels: (name, start, end) in seconds, of one GPU; seconds: how long the whole took."""
    parts = dict.fromkeys(PARTS, 0.0)
    names: dict[str, set[str]] = {ATTENTION: set(), OTHER: set()}
    computing = []
    everything = []
    for name, start, end in kernels:
        part = part_of_kernel(name)
        parts[part] += end - start
        everything.append((start, end))
        if part in COMPUTING:
            computing.append((start, end))
        if part in names:
            names[part].add(short_name(name))
    return Profile(
        seconds=seconds,
        parts=parts,
        exposed=covered(everything) - covered(computing),
        waiting=max(0.0, seconds - covered(everything)),
        attention=sorted(names[ATTENTION]),
        unknown=sorted(names[OTHER]),
    )


def short_name(name: str) -> str:
    """A kernel's name without what it returns, its template's arguments and its parameters."""
    return re.sub(r"[<(].*", "", name.removeprefix("void "))[:60]


def kernels_of(events: Iterable[Any]) -> list[tuple[str, float, float]]:
    """(name, start, end) in seconds of the kernels among torch.profiler's events."""
    found = []
    for event in events:
        # a record_function has a span on the GPU too, which is no kernel
        is_span = event.is_user_annotation or event.name.startswith(("FSDP::", "Optimizer."))
        if event.device_type == DeviceType.CUDA and not is_span:
            span = event.time_range
            found.append((event.name, span.start / 1e6, span.end / 1e6))
    return found


def profile_of_operators(averages: Iterable[Any], seconds: float) -> Profile:
    """The same from torch.profiler's key_averages() on a CPU: each operator's own time."""
    parts = dict.fromkeys(PARTS, 0.0)
    attention = set()
    for average in averages:
        part = part_of_kernel(average.key, OPERATORS)
        parts[part] += average.self_cpu_time_total / 1e6
        if part == ATTENTION and average.key.startswith("aten::_"):
            attention.add(short_name(average.key))
    return Profile(
        seconds=seconds,
        parts=parts,
        exposed=0.0,
        waiting=max(0.0, seconds - sum(parts.values())),
        attention=sorted(attention),
        unknown=[],
    )
