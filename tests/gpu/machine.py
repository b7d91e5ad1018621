"""What this machine is, and what it reaches: later shares are of these figures."""

import os
import shutil
import time

import torch
import torch.distributed as dist

from common.files import one_line
from gpu.expected import peak_of
from gpu.table import Context, Row
from gpu.timing import best_seconds, wait_for

# rows of activations: 4 samples of the paper's 2048 tokens
TOKENS = 8192
# (in, out) of the linear layers of a 13B block
LINEARS = ((5120, 5120), (5120, 13824), (13824, 5120))
# past every cache
STREAM_BYTES = 4 * 2**30
DISK_BYTES = 2**30


def machine(context: Context) -> list[Row]:
    """Figures that nothing is promised of, and whether triton and a C compiler work."""
    rows = [*identity(context), *products(context), *bandwidth(context), *host(context)]
    rows.append(compiling(context))
    return rows


def figure(check: str, measured: str, expected: str = "-") -> Row:
    """A row that promises nothing."""
    return Row(check, expected, measured, None)


def identity(context: Context) -> list[Row]:
    """Names and versions."""
    rows = [figure("torch", f"{torch.__version__}, CUDA {torch.version.cuda}", "2.11 or newer")]
    if context.device.type != "cuda":
        context.figures.update(gpu_name="CPU", gpu_gib=None, n_gpus=0)
        rows.append(figure("GPU", "none: a dry run"))
        return rows
    properties = torch.cuda.get_device_properties(context.device)
    n_gpus = torch.cuda.device_count()
    gib = properties.total_memory / 2**30
    context.figures.update(gpu_name=properties.name, gpu_gib=round(gib, 1), n_gpus=n_gpus)
    capability = f"{properties.major}.{properties.minor}"
    rows.append(figure("GPU", f"{n_gpus} x {properties.name}, {gib:.1f} GiB, sm {capability}"))
    nccl = "none"
    if dist.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    rows.append(figure("NCCL, cuDNN", f"{nccl}, {torch.backends.cudnn.version()}"))
    return rows


# --- 1. arithmetic --------------------------------------------------------------------------------


def products(context: Context) -> list[Row]:
    """TFLOPS of a 13B block's products in bf16, and in float32 with and without TF32."""
    known = peak_of(context.figures["gpu_name"])
    kinds = (
        ("bf16", torch.bfloat16, False, f"data sheet {known / 1e12:.0f} TFLOPS" if known else "-"),
        ("float32", torch.float32, False, "-"),
        ("tf32", torch.float32, True, "-"),
    )
    rows = []
    for name, dtype, is_tf32, expected in kinds:
        torch.backends.cuda.matmul.allow_tf32 = is_tf32
        tflops = max(product_tflops(context, dtype, *sizes) for sizes in LINEARS)
        context.figures[f"gemm_{name}_tflops"] = tflops
        check = f"product of a 13B block's size, {name}, best"
        rows.append(figure(check, f"{tflops:.3g} TFLOPS", expected))
    torch.backends.cuda.matmul.allow_tf32 = False
    return rows


def product_tflops(context: Context, dtype: torch.dtype, n_in: int, n_out: int) -> float:
    """Of (tokens, n_in) @ (n_in, n_out)."""
    tokens = TOKENS
    if context.is_dry:
        tokens = 64
        n_in //= 64
        n_out //= 64
    x = torch.randn(tokens, n_in, device=context.device, dtype=dtype)
    weight = torch.randn(n_out, n_in, device=context.device, dtype=dtype)
    seconds = best_seconds(context.device, lambda: torch.nn.functional.linear(x, weight), runs=20)
    return 2 * tokens * n_in * n_out / seconds / 1e12


# --- 2. memory ------------------------------------------------------------------------------------


def bandwidth(context: Context) -> list[Row]:
    """GB/s of a copy on the device (read and written), of a sum (read alone), and between host and
    device."""
    n_bytes = 2**24 if context.is_dry else STREAM_BYTES
    device = context.device
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * n_bytes / best_seconds(device, lambda: target.copy_(source), runs=10) / 1e9
    read = n_bytes / best_seconds(device, source.sum, runs=10) / 1e9
    context.figures.update(copy_gb_s=copy, read_gb_s=read, bandwidth_gb_s=max(copy, read))

    piece = target[: n_bytes // 16]
    host = torch.empty(piece.shape, pin_memory=device.type == "cuda")
    to_host = piece.nbytes / best_seconds(device, lambda: host.copy_(piece), runs=5) / 1e9
    to_device = piece.nbytes / best_seconds(device, lambda: piece.copy_(host), runs=5) / 1e9
    context.figures.update(to_host_gb_s=to_host, to_device_gb_s=to_device)
    return [
        figure("memory bandwidth", f"copy {copy:.0f} GB/s, reading alone {read:.0f} GB/s"),
        figure("pinned host memory", f"to it {to_host:.1f} GB/s, from it {to_device:.1f} GB/s"),
    ]


def host(context: Context) -> list[Row]:
    """RAM, /dev/shm, disk."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    ram = int(fields["MemTotal"].split()[0]) / 2**20
    free = int(fields["MemAvailable"].split()[0]) / 2**20
    shm = shutil.disk_usage("/dev/shm").free / 2**30 if os.path.isdir("/dev/shm") else 0
    speed = disk_speed(context)
    disk = shutil.disk_usage(context.out).free / 2**30
    context.figures.update(host_gib=ram, disk_gib=disk, disk_write_gb_s=speed)
    cores = len(os.sched_getaffinity(0))
    return [
        figure("host", f"{cores} cores, {ram:.0f} GiB ({free:.0f} free), /dev/shm {shm:.1f} GiB"),
        figure("disk under $OUT", f"{disk:.0f} GiB free, written at {speed:.2f} GB/s"),
    ]


def disk_speed(context: Context) -> float:
    """GB/s of one file, until the disk has it."""
    n_bytes = 2**24 if context.is_dry else DISK_BYTES
    block = os.urandom(2**24)
    path = context.out / "written"
    tic = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(n_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - tic
    path.unlink()
    return n_bytes / seconds / 1e9


# --- 3. torch.compile -----------------------------------------------------------------------------


def compiling(context: Context) -> Row:
    """Does torch.compile find what it needs, on CUDA triton and a C compiler?"""

    def silu_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(a) * b

    # inductor's first compilation on a CPU takes more than a minute
    backend = "aot_eager" if context.is_dry else "inductor"
    check = f"torch.compile ({backend})"
    expected = "compiles, within 1e-5"
    a, b = torch.randn(2, 1000, device=context.device)
    tic = time.perf_counter()
    try:
        compiled = torch.compile(silu_product, backend=backend)
        error = (compiled(a, b) - silu_product(a, b)).abs().max().item()
        wait_for(context.device)
    # whatever a compiler meets
    except Exception as trouble:
        return Row(check, expected, f"{type(trouble).__name__}: {one_line(trouble)[:200]}", False)
    seconds = time.perf_counter() - tic
    return Row(check, expected, f"{error:.1e}, {seconds:.0f} s", error <= 1e-5)
