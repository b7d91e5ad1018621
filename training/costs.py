"""What a step costs: memory and work by the model's sizes."""

from dataclasses import dataclass

import numpy as np

from qilin_min import LOSS_CHUNK, QilinConfig

GIB = 2**30
RESERVE_GIB = (
    3.0  # of a GPU's memory: CUDA context, NCCL's buffers, fragmentation; an estimate, not measured
)
SPARE_GIB = 5.0  # what must be left beside: batches differ, and an out-of-memory in hour 19 is dear


@dataclass
class Sizes:
    """Parameters by group. block: one decoder layer; root: what is gathered with the model itself (embeddings, head, norm, projector)."""

    config: QilinConfig
    trained: tuple  # of PARTS and "lora"
    lora: int = 0  # rank of the adapters
    quantize: str | None = (
        None  # "int8" | "int4": of the blocks' linear layers, which are then not sharded
    )
    e: int = 2

    def __post_init__(self):
        text, vision = self.config.text, self.config.vision
        C, F, V, Cv = text.hidden_size, text.intermediate_size, text.vocab_size, vision.hidden_size
        q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
        self.L, self.q, self.kv = text.num_hidden_layers, q, kv
        self.linear = 2 * C * q + 2 * C * kv + 3 * C * F  # q, o; k, v; gate, up, down
        self.adapter = self.lora * (2 * (C + q) + 2 * (C + kv) + 3 * (C + F))
        self.block = self.linear + 2 * C + self.adapter  # with the two norms
        self.embed = V * C * (1 if text.tie_word_embeddings else 2) + C
        self.projector = (
            Cv * C + C + (C * C + C if self.config.projector_type == "mlp2x_gelu" else 0)
        )
        self.tower = (
            vision.num_hidden_layers
            * (4 * Cv * Cv + 2 * Cv * vision.intermediate_size + 9 * Cv + vision.intermediate_size)
            + 3 * Cv * vision.patch_size**2
            + Cv * (self.config.n_image_tokens + 2)
            + 4 * Cv
        )
        is_tuned = "llm" in self.trained
        self.block_trained = self.block if is_tuned else self.adapter
        self.n_trained = (
            self.L * self.block_trained + (self.embed if is_tuned else 0) + self.projector
        )
        self.n_all = self.L * self.block + self.embed + self.projector + self.tower
        self.quantized = (
            self.L * self.linear * {None: 0, "int8": 1, "int4": 0.5 + 2 / 64}[self.quantize]
        )  # bytes, whole on every GPU; int4 has a scale for every 64
        self.gathered_block = self.block - (self.linear if self.quantize else 0)

    def block_activations(self):
        """Bytes a token that one block keeps for its backward when it does not recompute."""
        C, F, e, keep = (
            self.config.text.hidden_size,
            self.config.text.intermediate_size,
            self.e,
            "llm" in self.trained,
        )
        norms = 2 * (
            4 * C + (e * C if keep else 0) + (e * C if keep or self.lora else 0)
        )  # input in float32; normed, for the norm's own weight; output, for q k v, or gate up
        attention = (
            e * (2 * self.q + 2 * self.kv) + 4 * self.config.text.num_attention_heads
        )  # q, k, v, output; log-sum-exp
        mlp = (
            e * F * (4 if keep or self.lora else 3)
        )  # gate, silu(gate), up; their product, for down
        return norms + attention + mlp + 3 * e * self.lora  # a frozen weight needs no input kept


def memory(sizes, W, slots, n_checkpointed, n_labels=0, is_kept=False, is_accumulating=False):
    """{category: bytes} of one GPU at the peak of a training step, `peak` being their sum; slots = rows x longest row of a micro-batch.

    n_checkpointed: blocks that keep only their input and compute the rest again in backward. is_kept: blocks stay gathered between forward and backward.
    is_accumulating: more than one micro-batch a step, so that all gradients stand from the start.
    """
    s, C, V = sizes, sizes.config.text.hidden_size, sizes.config.text.vocab_size
    n_frozen = s.n_all - s.tower - s.n_trained - (s.L * s.linear if s.quantize else 0)
    out = {
        "parameters": (4 * s.n_trained + s.e * n_frozen) / W + s.e * s.tower + s.quantized,
        "optimiser": 8 * s.n_trained / W,
    }
    n_gathered = s.L if is_kept else min(2, s.L)  # in use, and the next one on its way
    out["gathered weights"] = s.e * (s.embed + s.projector + n_gathered * s.gathered_block)
    # one block's weight gradients, in e bytes, and again in float32 while they are summed over ranks
    out["gradients in flight"] = (s.e + 4) * max(
        s.block_trained, s.projector if s.block_trained == 0 else 0
    )
    inside, kept_input = s.block_activations(), s.e * C
    working = slots * (
        s.e * (3 * s.config.text.intermediate_size + 2 * C)
    )  # backward of one MLP: three gradients of its width, two of C
    if s.quantize:
        working += (
            2 * s.e * C * s.config.text.intermediate_size
        )  # a dequantised layer, and the product that makes it
    gradients = 4 * s.n_trained / W
    first = slots * (
        n_checkpointed * kept_input + max(s.L - n_checkpointed, 1) * inside
    )  # backward begins: all activations, few gradients
    last = slots * (kept_input + inside)  # backward ends: all gradients, few activations
    logits = min(n_labels, LOSS_CHUNK) * V * (s.e + 12) + n_labels * C * (
        s.e + 4
    )  # before backward: a chunk's logits, their float32, softmax and gradient
    at_loss = (
        slots * (n_checkpointed * kept_input + (s.L - n_checkpointed) * inside)
        + logits
        - working
        - out["gradients in flight"]
    )
    early, late, loss = (
        (first, gradients if is_accumulating else 4 * s.block_trained / W),
        (last, gradients),
        (at_loss, gradients if is_accumulating else 0),
    )
    activations, out["gradients"] = max((early, late, loss), key=sum)
    out["logits"] = logits if (activations, out["gradients"]) == loss else 0.0
    out["activations"] = activations - out["logits"] + working
    return dict(out, peak=sum(out.values()))


def blocks_to_checkpoint(sizes, W, slots, budget, **how):
    """The fewest blocks that must recompute for a micro-batch of `slots` to stay within `budget` bytes; None when all are too few."""
    return next(
        (n for n in range(sizes.L + 1) if memory(sizes, W, slots, n, **how)["peak"] <= budget), None
    )


def flops(sizes, lengths, n_pictures, n_labels):
    """Floating-point operations of training on samples of these lengths (tokens): what the model needs, nothing being computed twice.

    2 a weight and token forward, as many for the gradient of the input, as many for that of a trained weight. Causal attention: 2 T^2 C forward a layer
    (half of QK and of AV), twice that backward. The head works where labels are; the tower forward only.
    """
    s, vision = sizes, sizes.config.vision
    n_tokens, squares = (
        float(np.sum(lengths, dtype=np.float64)),
        float(np.sum(np.square(lengths, dtype=np.float64))),
    )
    times = 3 if "llm" in s.trained else 2
    llm = (
        2 * times * s.L * s.linear * n_tokens
        + 6 * s.L * s.q * squares
        + 6 * s.L * s.adapter * n_tokens
    )
    head = 2 * times * s.config.text.vocab_size * s.config.text.hidden_size * n_labels
    n_patches = s.config.n_image_tokens
    seen = (vision.num_hidden_layers - 1) / vision.num_hidden_layers
    tower = (
        seen
        * (
            2 * s.tower * (n_patches + 1)
            + 4 * vision.num_hidden_layers * vision.hidden_size * (n_patches + 1) ** 2
        )
        * n_pictures
    )
    return llm + head + tower + 4 * s.projector * n_patches * n_pictures


@dataclass
class Machine:
    """What the GPUs are. memory in bytes a GPU, flops a second at the peak in compute's dtype, bandwidth between GPUs in bytes a second."""

    world_size: int
    memory: float
    flops: float = 312e12  # A100, bf16, dense
    bandwidth: float = 200e9  # NVLink of an A100, what collectives reach of 300
    replicate: int = 1
    reserve: float = (RESERVE_GIB + SPARE_GIB) * GIB
    is_peak_known: bool = True  # False: flops are those of an A100 for want of better

    @property
    def budget(self):
        """Bytes that a step's peak may take."""
        return self.memory - self.reserve
