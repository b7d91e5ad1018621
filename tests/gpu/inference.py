"""Inference: 13B with random weights, made on the GPU, in bf16, int8 and int4: memory, prefill,
tokens a second with one row and with eight, beside what reading the weights alone would take; and a
training step of LoRA on int8 and on int4.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from common.files import one_line
from gpu.expected import TRAINED, StepShape, config_of, rates_of, step_parts
from gpu.memory import bytes_of_number, memory_of, memory_row, whose_rates
from gpu.rig import clean_up, compute_dtype, give_weights, play_ranks, wait_for
from gpu.table import Context, Row
from gpu.timing import best_seconds
from model_io.graphs import N_EAGER_STEPS, GraphDecoder, capture_decoding, launch_singly
from model_io.lowbit import WAYS, QuantizedLinear, choose_ways, quantize_linears
from model_io.lowbit_kernels import gpu_seconds
from qilin_min import IMAGE_TOKEN_INDEX, Qilin, QilinConfig, generate
from training.costs import GIB, count_sizes

BITS = {"bf16": None, "int8": 8, "int4": 4}
# of the bytes that a token reads, over the measured bandwidth: the goal of bf16
BOUND_SHARE = 0.75
# int8 beside bf16, tokens a second
INT8_GAIN = 1.5
# of what is counted by sizes: allocations are rounded up
WITHIN = 0.02
# beside the weights: what an answer takes, and what else holds the GPU
SPARE_GIB = 6


@dataclass
class Sizes:
    """Of what is measured."""

    model: str
    # tokens of text behind the picture
    text: int
    rows: int
    n_timed: int


def sizes_of(context: Context) -> Sizes:
    """The largest model that this GPU holds in bf16; the same of all kinds: they are compared."""
    if context.is_dry:
        return Sizes("tiny", text=8, rows=2, n_timed=3)
    room = memory_of(context.device) - SPARE_GIB * GIB
    fitting = [name for name in ("13B", "7B", "3B", "1B") if weight_bytes(name, "bf16") < room]
    return Sizes(fitting[0], text=64, rows=8, n_timed=32)


# --- 1. bytes -------------------------------------------------------------------------------------


def empty_model(config: QilinConfig, kind: str, dtype: torch.dtype) -> Qilin:
    """On the meta device."""
    with torch.device("meta"):
        model = Qilin(config)
        bits = BITS[kind]
        if bits is not None:
            quantize_linears(model, bits)
        return model.to(dtype).eval()


def n_bytes(module: torch.nn.Module) -> int:
    """Of parameters and buffers; what two of them share counts once."""
    found = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        # nothing on the meta device has an address
        key = storage.data_ptr() or id(tensor)
        found[key] = storage.nbytes()
    return sum(found.values())


def weight_bytes(name: str, kind: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """By the model's sizes."""
    return n_bytes(empty_model(config_of(name), kind, dtype))


def token_bytes(model: Qilin, rows: int, n_positions: int) -> int:
    """What one token a row must read: blocks, head, and keys and values of the positions."""
    text = model.config.text
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    e = head.weight.element_size()
    kv = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * n_positions * e
    return n_bytes(model.model.layers) + head.weight.nbytes + rows * kv


# --- 2. one answer --------------------------------------------------------------------------------


@dataclass
class Timed:
    """Of one answer: seconds until the first token, seconds a token after that, and all ids."""

    prefill: float
    step: float
    ids: list[list[int | None]]


def answer(model: Qilin, rows: int, sizes: Sizes, device: torch.device) -> Timed:
    """Rows that each ask of one picture. The steps before one is captured are not counted."""
    config = model.config
    prompt = [1] + [IMAGE_TOKEN_INDEX] * config.n_image_tokens + [5 + i for i in range(sizes.text)]
    size = config.vision.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(rows, 3, size, size, generator=generator)
    n_new = N_EAGER_STEPS + 3 + sizes.n_timed
    wait_for(device)
    times = [time.perf_counter()]
    ids = []
    for new in generate(model, [prompt] * rows, pixels, max_new_tokens=n_new):
        # the ids are on the host: the step is done
        times.append(time.perf_counter())
        ids.append(new)
    steps = [end - start for start, end in zip(times[1:-1], times[2:], strict=True)]
    return Timed(times[1] - times[0], statistics.median(steps[-sizes.n_timed :]), ids)


def build(context: Context, kind: str, sizes: Sizes) -> Qilin:
    """The model with random weights on the device; it never ends an answer."""
    model = empty_model(config_of(sizes.model), kind, compute_dtype(context.device))
    torch.manual_seed(0)
    give_weights(model, context.device)
    text = model.config.text
    model.config.n_token_ids = text.vocab_size
    model.config = replace(model.config, text=replace(text, eos_token_id=-1))
    return model


# --- 3. the steps ---------------------------------------------------------------------------------


def memory_of_weights(context: Context, model: Qilin, kind: str, sizes: Sizes) -> Row:
    """Against the sizes; on a GPU by its allocator."""
    want = weight_bytes(sizes.model, kind, compute_dtype(context.device))
    got = n_bytes(model)
    if context.device.type == "cuda":
        got = torch.cuda.memory_allocated(context.device)
    context.figures[f"inference: {kind}: GiB"] = got / GIB
    return Row(
        f"memory of {sizes.model} in {kind}",
        f"{want / GIB:.3g} GiB, within {WITHIN:.0%}",
        f"{got / GIB:.3g} GiB",
        abs(got / want - 1) <= WITHIN,
    )


def widening_seconds(n_numbers: float, stored: float, e: int, bandwidth: float) -> float:
    """Numbers of low bits, stored in so many bytes, are read, written as floats and read again."""
    return (stored + 2 * e * n_numbers) / bandwidth


def prefill_row(context: Context, model: Qilin, kind: str, timed: Timed, sizes: Sizes) -> Row:
    """Beside the blocks' products alone, with many rows widened."""
    context.figures[f"inference: {kind}: prefill s"] = timed.prefill
    rates = rates_of(context.figures, context.is_dry)
    counted = count_sizes(model.config, TRAINED[1])
    n_numbers = counted.n_blocks * counted.linear
    n_tokens = 1 + model.config.n_image_tokens + sizes.text
    at_least = 2 * n_tokens * n_numbers / rates.gemm
    if BITS[kind] is not None:
        e = bytes_of_number(context.device)
        stored = n_bytes(model.model.layers)
        at_least += widening_seconds(n_numbers, stored, e, rates.bandwidth)
    return Row(
        f"{sizes.model} in {kind}, until the first token",
        f"at least {1000 * at_least:.3g} ms ({whose_rates(context.is_dry)})",
        f"{1000 * timed.prefill:.4g} ms, a picture and text: {n_tokens} tokens",
        None,
    )


def speed_row(
    context: Context, model: Qilin, kind: str, way: str, rows: int, timed: Timed, sizes: Sizes
) -> Row:
    """Tokens a second beside the bound; a goal for one row that is captured."""
    n_positions = 1 + model.config.n_image_tokens + sizes.text + len(timed.ids)
    rate = rates_of(context.figures, context.is_dry).bandwidth
    bound = rows * rate / token_bytes(model, rows, n_positions)
    computed = whose_rates(context.is_dry)
    per_second = rows / timed.step
    share = per_second / bound
    context.figures[f"inference: {kind}, {way}, {rows}: tokens/s"] = per_second
    expected = f"at most {bound:.4g} tokens/s ({computed})"
    holds = None
    if way == "captured" and rows == 1:
        plain = context.figures.get(f"inference: bf16, {way}, 1: tokens/s")
        if kind == "bf16":
            expected = f"{BOUND_SHARE:.0%} of {bound:.4g} tokens/s ({computed})"
            holds = share >= BOUND_SHARE
        elif plain is not None:
            gain = INT8_GAIN if kind == "int8" else 1.0
            expected += f"; more than {gain:g} x {plain:.4g}, bf16"
            holds = per_second > gain * plain
    return Row(
        f"{sizes.model} in {kind}, {rows} at a time, {way}",
        expected,
        f"{per_second:.4g} tokens/s, {share:.0%}",
        # a CPU at tiny sizes is not what the goals are about
        None if context.is_dry else holds,
    )


def captured_row(context: Context, model: Qilin, kind: str, ids: list, singly: list) -> Row:
    """Was a step captured, and did it say what the kernels say one by one?"""
    decoder = model.__dict__["decode"]
    assert isinstance(decoder, GraphDecoder), "put there before"
    n_same = sum(a == b for a, b in zip(ids, singly, strict=True))
    measured = f"{decoder.trouble or 'captured'}; {n_same} of {len(ids)} ids alike"
    return Row(
        f"steps in {kind} as CUDA graphs",
        "captured; ids alike until two are nearly as likely",
        measured,
        None if context.is_dry else decoder.trouble is None,
    )


@torch.no_grad()
def inference(context: Context, kind: str) -> list[Row]:
    """All rows of one kind of numbers."""
    sizes = sizes_of(context)
    model = build(context, kind, sizes)
    rows = [memory_of_weights(context, model, kind, sizes)]
    line = choose_ways(model)
    if line is not None:
        rows.append(Row(f"{kind}: how one token is multiplied", "-", line, None))
    # what is made at first use
    answer(model, 1, sizes, context.device)
    for n in (1, sizes.rows):
        launch_singly(model)
        singly = answer(model, n, sizes, context.device)
        if n == 1:
            rows.append(prefill_row(context, model, kind, singly, sizes))
        capture_decoding(model)
        captured = answer(model, n, sizes, context.device)
        for way, timed in (("captured", captured), ("one by one", singly)):
            rows.append(speed_row(context, model, kind, way, n, timed, sizes))
        if n == 1:
            rows.append(captured_row(context, model, kind, captured.ids, singly.ids))
    return rows


def inference_bf16(context: Context) -> list[Row]:
    """In float32 on a CPU."""
    return inference(context, "bf16")


def inference_int8(context: Context) -> list[Row]:
    return inference(context, "int8")


def inference_int4(context: Context) -> list[Row]:
    return inference(context, "int4")


@torch.no_grad()
def inference_compiled(context: Context) -> list[Row]:
    """--compile, by itself and captured, beside the rows of bf16."""
    sizes = sizes_of(context)
    model = build(context, "bf16", sizes)
    # on a CPU inductor takes more than a minute
    backend = "eager" if context.is_dry else "inductor"
    model.model.compile(dynamic=True, backend=backend)
    tic = time.perf_counter()
    answer(model, 1, sizes, context.device)
    seconds = time.perf_counter() - tic
    rows = [Row(f"{sizes.model} compiled: first answer", "-", f"{seconds:.0f} s", None)]
    singly = answer(model, 1, sizes, context.device)
    rows.append(speed_row(context, model, "bf16", "compiled", 1, singly, sizes))
    capture_decoding(model)
    answer(model, 1, sizes, context.device)
    captured = answer(model, 1, sizes, context.device)
    way = "compiled and captured"
    rows.append(speed_row(context, model, "bf16", way, 1, captured, sizes))
    return rows


# --- 4. the products of low bits, one by one ------------------------------------------------------

# of a product in bfloat16, relative: its rounding is 2^-9
PRODUCT_OFF = 2**-7
# (in, out) of the linear layers of a 13B block
LINEARS = ((5120, 5120), (5120, 13824), (13824, 5120))
TINY_LINEARS = ((256, 704), (704, 256))


def seconds_of(context: Context, call: Callable[[], Tensor]) -> float:
    """On a GPU as the ways are chosen, its cache emptied before each call."""
    if context.device.type == "cuda":
        return gpu_seconds(call, context.device)
    return best_seconds(context.device, call, runs=3)


def product_row(
    context: Context, name: str, x: Tensor, linear: QuantizedLinear, plain: float
) -> Row:
    """One of WAYS beside the widened weight in float32. plain: seconds of bf16's own product."""
    n_out, n_in = linear.shape
    check = f"int{linear.bits}, {n_in} to {n_out}, {len(x)} at a time, {name}"
    expected = f"within {PRODUCT_OFF:.1%} of the widened weight's; bf16 takes {1e6 * plain:.3g} µs"
    want = x.float() @ linear.dequantize(torch.float32).T  # (B, out)
    if WAYS[name].needs_tiles:
        linear.make_tiled()
    call = partial(WAYS[name].multiply, x, linear)
    try:
        off = float((call().float() - want).norm() / want.norm())
    # no compiler, no Triton, a GPU too old: the others are chosen then
    except Exception as error:
        return Row(check, expected, f"not to be had: {one_line(error)[:200]}", None)
    seconds = seconds_of(context, call)
    rate = n_bytes(linear) / seconds / 1e9
    measured = f"{off:.1e}, {1e6 * seconds:.3g} µs, {rate:.3g} GB/s"
    return Row(check, expected, measured, off <= PRODUCT_OFF)


@torch.no_grad()
def low_bit_products(context: Context) -> list[Row]:
    """Each of WAYS on the shapes of 13B: is it right, and how fast?"""
    rows = []
    dtype = compute_dtype(context.device)
    for n_in, n_out in TINY_LINEARS if context.is_dry else LINEARS:
        weight = torch.randn(n_out, n_in, device=context.device, dtype=dtype)
        for n in (1, 8):
            x = torch.randn(n, n_in, device=context.device, dtype=dtype)
            plain = seconds_of(context, partial(torch.nn.functional.linear, x, weight))
            for bits in (8, 4):
                for name, way in WAYS.items():
                    linear = QuantizedLinear(n_in, n_out, bits).to(context.device, dtype)
                    linear.quantize_(weight)
                    if way.may_take(linear, x):
                        rows.append(product_row(context, name, x, linear, plain))
    return rows


# --- 5. training on low bits ----------------------------------------------------------------------


def lora_shapes(context: Context) -> list[StepShape]:
    """One picture and 700 tokens of text, adapters of 16 on every linear layer."""
    name = sizes_of(context).model
    n_blocks = config_of(name).text.num_hidden_layers
    n_tokens = 64 if context.is_dry else 1 + config_of(name).n_image_tokens + 700
    return [
        StepShape(
            f"LoRA of 16 on {quantize}, all recomputed",
            name,
            trains="lora",
            rows=1,
            tokens=n_tokens,
            n_checkpointed=n_blocks,
            lora=16,
            quantize=quantize,
        )
        for quantize in ("int8", "int4")
    ]


def lora_step(context: Context) -> list[Row]:
    """Memory and seconds of a step."""
    play_ranks(1, context.device)
    rates = rates_of(context.figures, context.is_dry)
    e = bytes_of_number(context.device)
    rows = []
    for shape in lora_shapes(context):
        row, measured = memory_row(context, shape, n_shards=1)
        rows.append(row)
        if measured is None:
            continue
        sizes = shape.sizes(e)
        n_numbers = sizes.n_blocks * sizes.linear
        widening = widening_seconds(n_numbers, sizes.quantized, e, rates.bandwidth)
        # forward, recomputed and backward
        at_least = step_parts(shape, rates, 1, e).total + 3 * widening
        rows.append(
            Row(
                f"a step of {shape.model}, {shape.what}, 1 x {shape.tokens}",
                f"at least {at_least:.2g} s ({whose_rates(context.is_dry)})",
                f"{measured.seconds:.3g} s",
                None,
            )
        )
        clean_up(context.device)
    torch.distributed.destroy_process_group()
    return rows
