"""What a step costs: memory, traffic between GPUs and work by the model's sizes.

Every figure is a formula of a line or two, in bytes and floating-point operations, that a reader
can follow; tests hold them to what a step of the real model holds and sends. Only parameters are
counted, on the model itself without its numbers, so that another projector or another choice of
what is trained needs no formula.

In the formulas: C hidden size, F MLP width, V vocabulary, L blocks, e bytes of a number in compute
(2: bf16 on CUDA, 4: float32 on a CPU). slots are the tokens with padding that a GPU holds at one
time; n_shards the GPUs that share one copy of the weights. Trained weights, their gradients and
both of Adam's moments are float32: 16 bytes each.
"""

from dataclasses import astuple, dataclass

import numpy as np
import torch
import torch.nn as nn

from model_io.lowbit import add_lora
from qilin_min import LOSS_CHUNK, Qilin, QilinConfig, part_of
from training.freeze import freeze

GIB = 2**30
# of a GPU's memory: CUDA context, NCCL's buffers, fragmentation; an estimate, not measured
RESERVE_GIB = 3.0
# what must be left beside: batches differ, and an out-of-memory in hour 19 is dear
SPARE_GIB = 5.0
# bytes of a quantised weight; int4 has a scale and a zero for every 32
QUANTIZED_BYTES = {"int8": 1, "int4": 0.5 + 2 * 2 / 32}


# --- 1. sizes -------------------------------------------------------------------------------------
# in: QilinConfig, what is trained; out: Sizes, numbers of parameters by group


@dataclass
class Sizes:
    """Parameters by group, from count_sizes().

    A block is one decoder layer; the root is what is gathered with the model itself: embed and
    projector. All blocks are alike but for what is trained in them.
    """

    config: QilinConfig
    lora: int  # rank of the adapters, 0: none
    quantize: str | None  # "int8" | "int4": of the blocks' linear layers, then not sharded
    e: int  # bytes of a number in compute
    is_fused: bool  # a norm is one kernel, as on CUDA

    n_blocks: int
    linear: int  # of a block's linear layers, without adapters: q, k, v, o, gate, up, down
    block: int  # of a whole block, with norms and adapters
    embed: int  # embeddings, head, last norm
    projector: int
    tower: int

    linear_trained: int  # of the linear layers of all blocks, without adapters
    adapter_trained: int  # of the adapters of all blocks
    block_trained: int  # of the block of which most is trained
    n_blocks_trained: int  # blocks in which anything is trained
    root_trained: int  # of embed and projector
    is_head_trained: bool
    n_trained: int
    n_all: int

    @property
    def q_width(self) -> int:
        return self.config.text.num_attention_heads * self.config.text.head_dim

    @property
    def kv_width(self) -> int:
        return self.config.text.num_key_value_heads * self.config.text.head_dim

    @property
    def passes(self) -> float:
        """How often a block's weights are multiplied: forward, for the input's gradient, and for
        that of the weight where it is trained. 2 to 3."""
        return 2 + self.linear_trained / (self.n_blocks * self.linear)

    @property
    def quantized(self) -> float:
        """Bytes of the quantised weights, whole on every GPU."""
        if self.quantize is None:
            return 0
        return self.n_blocks * self.linear * QUANTIZED_BYTES[self.quantize]

    @property
    def gathered_block(self) -> int:
        """Parameters of a block that are sharded, and gathered before it computes."""
        if self.quantize is None:
            return self.block
        return self.block - self.linear

    def block_activations(self) -> int:
        """Bytes a token that one block keeps for its backward when it does not recompute.

        A compiled one keeps e F less, the product for down, which it computes again: not counted.
        """
        C = self.config.text.hidden_size
        F = self.config.text.intermediate_size
        e = self.e
        # a frozen weight needs no input kept, unless an adapter beside it does
        keeps_for_norms = self.linear_trained > 0
        keeps_for_linears = self.linear_trained > 0 or self.lora > 0

        # input; output, for q k v, or gate up
        norm = e * C
        if not self.is_fused:
            # the input in float32 instead; normed, for the norm's own weight
            norm = 4 * C
            if keeps_for_norms:
                norm += e * C
        if keeps_for_linears:
            norm += e * C
        # q, k, v, output; log-sum-exp
        attention = e * (2 * self.q_width + 2 * self.kv_width)
        attention += 4 * self.config.text.num_attention_heads
        # gate, silu(gate), up; their product, for down
        mlp = e * F * (4 if keeps_for_linears else 3)
        return 2 * norm + attention + mlp + 3 * e * self.lora


def count_params(module: nn.Module, *, trained_only: bool = False) -> int:
    params = module.parameters()
    return sum(p.numel() for p in params if p.requires_grad or not trained_only)


def count_sizes(
    config: QilinConfig,
    trained: tuple[str, ...],
    lora: int = 0,
    quantize: str | None = None,
    e: int = 2,
    is_fused: bool = False,
) -> Sizes:
    """Sizes of a model, counted on the model itself, built on the meta device and frozen as
    training does.

    trained: as in freeze(); lora: rank of the adapters; quantize: None | "int8" | "int4"; e: bytes
    of a number in compute; is_fused: a norm is one kernel, as on CUDA, which keeps no float32 copy
    of its input.
    """
    with torch.device("meta"):
        model = Qilin(config)
        if lora:
            add_lora(model, lora, alpha=1.0)
    freeze(model, trained)

    blocks = model.model.layers
    linears = [layer for layer in blocks.modules() if isinstance(layer, nn.Linear)]
    adapters = [p for name, p in blocks.named_parameters() if part_of(name) == "lora"]
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    n_in_blocks = count_params(blocks)
    projector = count_params(model.mm_projector)
    tower = count_params(model.vision_tower)
    n_all = count_params(model)
    n_trained = count_params(model, trained_only=True)
    trained_of_blocks = [count_params(block, trained_only=True) for block in blocks]
    return Sizes(
        config=config,
        lora=lora,
        quantize=quantize,
        e=e,
        is_fused=is_fused,
        n_blocks=len(blocks),
        linear=sum(x.weight.numel() for x in linears) // len(blocks),
        block=n_in_blocks // len(blocks),
        embed=n_all - n_in_blocks - projector - tower,
        projector=projector,
        tower=tower,
        linear_trained=sum(x.weight.numel() for x in linears if x.weight.requires_grad),
        adapter_trained=sum(p.numel() for p in adapters if p.requires_grad),
        block_trained=max(trained_of_blocks),
        n_blocks_trained=sum(1 for n in trained_of_blocks if n > 0),
        root_trained=n_trained - sum(trained_of_blocks),
        is_head_trained=head.weight.requires_grad,
        n_trained=n_trained,
        n_all=n_all,
    )


# --- 2. memory ------------------------------------------------------------------------------------
# in: Sizes, a micro-batch; out: Memory of one GPU at the peak of a step


@dataclass
class Memory:
    """Bytes of one GPU at the peak of a training step, in the order in which a plan lists them."""

    parameters: float
    optimiser: float
    gathered_weights: float
    gradients_in_flight: float
    gradients: float
    logits: float
    activations: float

    @property
    def peak(self) -> float:
        return sum(astuple(self))


def parameter_bytes(sizes: Sizes, n_shards: int) -> float:
    """Trained ones in float32 and frozen ones, sharded; the tower and quantised weights, whole."""
    n_frozen = sizes.n_all - sizes.tower - sizes.n_trained
    if sizes.quantize:
        n_frozen -= sizes.n_blocks * sizes.linear
    sharded = (4 * sizes.n_trained + sizes.e * n_frozen) / n_shards
    return sharded + sizes.e * sizes.tower + sizes.quantized


def gathered_bytes(sizes: Sizes, is_kept: bool) -> int:
    """The root and the blocks that stand whole at one time."""
    n_gathered = min(2, sizes.n_blocks)  # in use, and the next one on its way
    if is_kept:
        n_gathered = sizes.n_blocks
    return sizes.e * (sizes.embed + sizes.projector + n_gathered * sizes.gathered_block)


def in_flight_bytes(sizes: Sizes) -> int:
    """One block's weight gradients, in e bytes, and again in float32 while they are summed over
    ranks."""
    return (sizes.e + 4) * (sizes.block_trained or sizes.projector)


def working_bytes(sizes: Sizes, slots: int) -> int:
    """Backward of one MLP: three gradients of its width, two of C."""
    C = sizes.config.text.hidden_size
    F = sizes.config.text.intermediate_size
    working = slots * sizes.e * (3 * F + 2 * C)
    if sizes.quantize:
        # a dequantised layer, and the product that makes it
        working += 2 * sizes.e * C * F
    return working


def logits_bytes(sizes: Sizes, n_labels: int) -> int:
    """Before backward: a chunk's logits, their float32, softmax and gradient; hidden states at
    labels."""
    C = sizes.config.text.hidden_size
    V = sizes.config.text.vocab_size
    e = sizes.e
    return min(n_labels, LOSS_CHUNK) * V * (e + 12) + n_labels * C * (e + 4)


@dataclass
class Moment:
    """Bytes that stand at one moment of a step and not at others; activations include the
    logits."""

    activations: float
    gradients: float
    logits: float = 0.0

    @property
    def total(self) -> float:
        return self.activations + self.gradients


def moments(
    sizes: Sizes,
    n_shards: int,
    slots: int,
    n_checkpointed: int,
    *,
    n_labels: int,
    is_accumulating: bool,
) -> list[Moment]:
    """The moments of a step of which one is its peak."""
    all_gradients = 4 * sizes.n_trained / n_shards
    kept_input = sizes.e * sizes.config.text.hidden_size  # bytes a token
    inside = sizes.block_activations()
    inputs = n_checkpointed * kept_input
    n_whole = sizes.n_blocks - n_checkpointed

    # backward begins: all activations, few gradients
    begin = Moment(
        activations=slots * (inputs + max(n_whole, 1) * inside),
        gradients=4 * sizes.block_trained / n_shards,
    )
    # backward ends: all gradients, few activations
    end = Moment(activations=slots * (kept_input + inside), gradients=all_gradients)
    # the loss: no backward at work yet, no gradient in flight
    logits = logits_bytes(sizes, n_labels)
    not_yet = working_bytes(sizes, slots) + in_flight_bytes(sizes)
    loss = Moment(
        activations=slots * (inputs + n_whole * inside) + logits - not_yet,
        gradients=0,
        logits=logits,
    )
    if is_accumulating:
        begin.gradients = all_gradients
        loss.gradients = all_gradients
    return [begin, end, loss]


def step_memory(
    sizes: Sizes,
    n_shards: int,
    slots: int,
    n_checkpointed: int,
    *,
    n_labels: int = 0,
    is_kept: bool = False,
    is_accumulating: bool = False,
) -> Memory:
    """Memory of one GPU at the peak of a training step; slots: rows x longest row of a micro-batch.

    n_checkpointed: blocks that keep only their input and compute the rest again in backward.
    is_kept: blocks stay gathered between forward and backward. is_accumulating: more than one
    micro-batch a step, so that all gradients stand from the start.
    """
    candidates = moments(
        sizes,
        n_shards,
        slots,
        n_checkpointed,
        n_labels=n_labels,
        is_accumulating=is_accumulating,
    )
    worst = max(candidates, key=lambda moment: moment.total)
    return Memory(
        parameters=parameter_bytes(sizes, n_shards),
        optimiser=8 * sizes.n_trained / n_shards,
        gathered_weights=gathered_bytes(sizes, is_kept),
        gradients_in_flight=in_flight_bytes(sizes),
        gradients=worst.gradients,
        logits=worst.logits,
        activations=worst.activations - worst.logits + working_bytes(sizes, slots),
    )


def blocks_to_checkpoint(
    sizes: Sizes,
    n_shards: int,
    slots: int,
    budget: float,
    *,
    n_labels: int,
    is_kept: bool,
    is_accumulating: bool,
) -> int | None:
    """The fewest blocks that must recompute for a micro-batch of `slots` to stay within `budget`
    bytes; None when all are too few."""
    for n in range(sizes.n_blocks + 1):
        needed = step_memory(
            sizes,
            n_shards,
            slots,
            n,
            n_labels=n_labels,
            is_kept=is_kept,
            is_accumulating=is_accumulating,
        )
        if needed.peak <= budget:
            return n
    return None


@dataclass
class Phases:
    """Peak bytes of one GPU in each phase of a step, and in what follows some steps."""

    forward: float
    backward: float
    clipping: float
    step: float
    checkpoint: float
    export: float


def phase_peaks(
    sizes: Sizes,
    n_shards: int,
    slots: int,
    n_checkpointed: int,
    *,
    n_labels: int,
    is_kept: bool = False,
    is_accumulating: bool = False,
) -> Phases:
    """The peak of each phase; arguments as in step_memory(), which gives the largest by kind."""
    begin, end, loss = moments(
        sizes,
        n_shards,
        slots,
        n_checkpointed,
        n_labels=n_labels,
        is_accumulating=is_accumulating,
    )
    standing = parameter_bytes(sizes, n_shards) + 8 * sizes.n_trained / n_shards
    working = working_bytes(sizes, slots)
    computing = standing + gathered_bytes(sizes, is_kept) + working + in_flight_bytes(sizes)
    # a block that keeps nothing makes three tensors of the MLP's width all the same, when the
    # logits are not there yet
    in_block = working if n_checkpointed else 0
    # clipped and applied in place
    updating = standing + 4 * sizes.n_trained / n_shards
    # this rank's rows of the largest matrix, and the whole
    text = sizes.config.text
    largest = text.hidden_size * max(text.vocab_size, text.intermediate_size)
    gathering = sizes.e * largest * (1 + 1 / n_shards)
    return Phases(
        forward=computing + loss.total + max(0, in_block - loss.logits),
        backward=computing + max(begin.total, end.total),
        clipping=updating,
        step=updating,
        # copied to the host, tensor by tensor
        checkpoint=standing,
        export=standing + gathering,
    )


def checkpoint_bytes(sizes: Sizes) -> int:
    """Of a checkpoint, on the disk and in the memory of all hosts while it is written: what is
    trained in float32, and both of Adam's moments."""
    return 12 * sizes.n_trained


# --- 3. traffic -----------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Collectives that a GPU takes part in, and their bytes: those of whole tensors, of which
    (n_shards - 1) / n_shards come from others."""

    n_gathers: int
    gathered: float
    n_sums: int
    summed: float


def micro_batch_traffic(sizes: Sizes, is_kept: bool) -> Traffic:
    """What forward and backward of one micro-batch move.

    Gathered, in e bytes: the root once, since it stays until backward has passed; each block before
    its forward and, unless kept, again before its backward: 2 L all-gathers, the
    last block staying for the backward that follows at once. Summed, in
    float32: the gradients of each block and of the root where any is trained, a reduce-scatter
    each.
    A step is its micro-batches and three all-reduces of a few numbers: what is to come, the norm
    of the gradients, the loss.
    """
    n_of_blocks = sizes.n_blocks if is_kept else 2 * sizes.n_blocks - 1
    root = sizes.embed + sizes.projector
    n_roots_trained = 1 if sizes.root_trained else 0
    return Traffic(
        n_gathers=1 + n_of_blocks,
        gathered=sizes.e * (root + n_of_blocks * sizes.gathered_block),
        n_sums=sizes.n_blocks_trained + n_roots_trained,
        summed=4 * sizes.n_trained,
    )


# --- 4. work --------------------------------------------------------------------------------------


def flops(sizes: Sizes, lengths: np.ndarray, n_pictures: float, n_labels: float) -> float:
    """Floating-point operations of training on samples of these lengths (tokens): what the model
    needs, nothing being computed twice.

    2 a weight and token forward, as many for the gradient of the input, as many for that of a
    trained weight. Causal attention: 2 T^2 C forward a layer of a sample of T tokens (half of QK
    and of AV), twice that backward. The head works where labels are; the tower forward only.
    """
    text = sizes.config.text
    vision = sizes.config.vision
    L = sizes.n_blocks
    n_tokens = float(np.sum(lengths, dtype=np.float64))
    squares = float(np.sum(np.square(lengths, dtype=np.float64)))

    linears = 2 * sizes.passes * L * sizes.linear * n_tokens
    attention = 6 * L * sizes.q_width * squares
    adapters = 6 * sizes.adapter_trained * n_tokens

    head_passes = 3 if sizes.is_head_trained else 2
    head = 2 * head_passes * text.vocab_size * text.hidden_size * n_labels

    # the last of its layers is loaded, but not computed
    computed = (vision.num_hidden_layers - 1) / vision.num_hidden_layers
    n_positions = sizes.config.n_image_tokens + 1
    tower_attention = 4 * vision.num_hidden_layers * vision.hidden_size * n_positions**2
    tower = computed * (2 * sizes.tower * n_positions + tower_attention) * n_pictures

    projector = 4 * sizes.projector * sizes.config.n_image_tokens * n_pictures
    return linears + attention + adapters + head + tower + projector


# --- 5. machine -----------------------------------------------------------------------------------


@dataclass
class Machine:
    """What the GPUs are."""

    world_size: int
    memory: float  # bytes a GPU
    flops: float = 312e12  # a second and GPU, in compute's dtype: A100, bf16, dense
    bandwidth: float = (
        200e9  # bytes a second between GPUs: of an A100's NVLink, what collectives reach of 300
    )
    replicate: int = 1  # copies of the weights
    reserve: float = (RESERVE_GIB + SPARE_GIB) * GIB  # bytes a GPU that a step must leave
    is_peak_known: bool = True  # False: flops are those of an A100 for want of better

    @property
    def n_shards(self) -> int:
        """GPUs that share one copy of the weights."""
        return self.world_size // self.replicate

    @property
    def budget(self) -> float:
        """Bytes that a step's peak may take."""
        return self.memory - self.reserve
