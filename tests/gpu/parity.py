"""Our model beside transformers' on the device: the tower, LLaMA, the whole LLaVA, its gradients,
8 and 4 bits beside the CPU's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration

from gpu.models import LARGE, TINY, Batch, Shape, batch_for, pixels, save_clip, save_llama, text_ids
from gpu.table import Context, Row
from model_io.export import save_qilin
from model_io.load import load_qilin
from qilin_min import IMAGE_TOKEN_INDEX, Qilin, part_of

# of float32, largest difference of outputs whose spread is about 1; TF32 is off
LIMIT = 1e-3
# our bf16 may be so many times as far from float32 as transformers' own is
WORSE = 1.5
# work(dtype) -> output in float32, of transformers or ours
Work = Callable[[torch.dtype], torch.Tensor]


def parity(context: Context) -> list[Row]:
    """All rows: whether this GPU computes what transformers computes."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    shape = TINY if context.is_dry else LARGE
    save_clip(shape, context.out / "clip")
    save_llama(shape, shape.heads, context.out / "mha")
    save_llama(shape, shape.heads // 2, context.out / "gqa")
    rows = [*tower_rows(context, shape)]
    rows += llama_rows(context, shape, "mha")
    rows += llama_rows(context, shape, "gqa")
    whole = load_qilin(
        llm=context.out / "gqa", vision=context.out / "clip", projector_type="mlp2x_gelu"
    )
    save_qilin(whole, None, context.out / "whole")
    rows += llava_rows(context, shape)
    rows += [gradient_row(context, shape, stage) for stage in (1, 2)]
    for bits in ("int8", "int4"):
        rows += low_bit_rows(context, shape, bits)
    return rows


# --- 1. outputs -----------------------------------------------------------------------------------


def spread(values: torch.Tensor) -> str:
    """How absolute differences are distributed."""
    ordered = values.abs().flatten().sort().values
    last = len(ordered) - 1
    median, high = (ordered[round(share * last)].item() for share in (0.5, 0.99))
    return f"median {median:.1e}, 99 % {high:.1e}, max {ordered[-1].item():.1e}"


def rms(values: torch.Tensor) -> float:
    return values.float().pow(2).mean().sqrt().item()


def compare(name: str, theirs: Work, ours: Work) -> list[Row]:
    """A row for float32 and one for bf16."""
    want = theirs(torch.float32)
    worst = (ours(torch.float32) - want).abs().max().item()
    our_error = ours(torch.bfloat16) - want
    their_error = theirs(torch.bfloat16) - want
    ratio = rms(our_error) / rms(their_error)
    return [
        Row(
            f"{name}, float32, beside transformers",
            f"max difference {LIMIT:.0e} (spread {want.std().item():.2f})",
            f"{worst:.1e}",
            worst <= LIMIT and want.std().item() > 0.1,
        ),
        Row(
            f"{name}, bf16, beside transformers' float32",
            f"at most {WORSE} x transformers' own bf16 ({spread(their_error)})",
            f"{ratio:.2f} x ({spread(our_error)})",
            0 < ratio <= WORSE,
        ),
    ]


def of_transformers(
    kind: Any, folder: Path, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """A model of transformers; its own way to attend, which is the fused one."""
    return kind.from_pretrained(folder, dtype=dtype).eval().to(device)


def parts(context: Context, llama: str, dtype: torch.dtype, quantize: str | None = None) -> Qilin:
    """Ours, of a folder of save_llama and the one of save_clip."""
    return load_qilin(
        llm=context.out / llama,
        vision=context.out / "clip",
        dtype=dtype,
        device=context.device,
        quantize=quantize,
    )


def tower_rows(context: Context, shape: Shape) -> list[Row]:
    """Features of the last block but one, without the class token."""
    x = pixels(3, shape.image).to(context.device)

    @torch.no_grad()
    def theirs(dtype: torch.dtype) -> torch.Tensor:
        hf = of_transformers(CLIPVisionModel, context.out / "clip", context.device, dtype)
        output = hf(x.to(dtype), output_hidden_states=True)
        return output.hidden_states[-2][:, 1:].float()

    @torch.no_grad()
    def ours(dtype: torch.dtype) -> torch.Tensor:
        return parts(context, "mha", dtype).vision_tower(x).float()

    return compare("CLIP", theirs, ours)


def llama_rows(context: Context, shape: Shape, kind: str) -> list[Row]:
    """Logits of two texts."""
    texts = [text_ids(shape.text, seed, shape.vocabulary) for seed in (1, 2)]
    ids = torch.tensor(texts, device=context.device)

    @torch.no_grad()
    def theirs(dtype: torch.dtype) -> torch.Tensor:
        hf = of_transformers(LlamaForCausalLM, context.out / kind, context.device, dtype)
        return hf(ids).logits.float()

    @torch.no_grad()
    def ours(dtype: torch.dtype) -> torch.Tensor:
        return parts(context, kind, dtype)(ids)

    return compare(f"LLaMA logits ({kind.upper()})", theirs, ours)


def their_inputs(batch: Batch, hf: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A batch in transformers' spelling: the picture token's id at picture positions."""
    return {
        "input_ids": batch.ids.masked_fill(
            batch.ids == IMAGE_TOKEN_INDEX, hf.config.image_token_id
        ),
        "pixel_values": batch.pixel_values.to(dtype),
        "attention_mask": batch.mask,
    }


def llava_rows(context: Context, shape: Shape) -> list[Row]:
    """Logits of a padded batch with 0, 1 and 2 pictures."""
    batch = batch_for(shape).on(context.device)
    is_token = batch.mask.bool()

    @torch.no_grad()
    def theirs(dtype: torch.dtype) -> torch.Tensor:
        hf = of_llava(context, dtype)
        logits = hf(**their_inputs(batch, hf, dtype)).logits
        return logits[is_token][:, : shape.vocabulary].float()

    @torch.no_grad()
    def ours(dtype: torch.dtype) -> torch.Tensor:
        model = load_qilin(context.out / "whole", dtype=dtype, device=context.device)
        return model(batch.ids, batch.pixel_values)[is_token][:, : shape.vocabulary]

    return compare("LLaVA logits, batch of 0, 1, 2 pictures", theirs, ours)


def of_llava(context: Context, dtype: torch.dtype) -> Any:
    return of_transformers(
        LlavaForConditionalGeneration, context.out / "whole", context.device, dtype
    )


# --- 2. gradients ---------------------------------------------------------------------------------

STAGES = {1: ("mm_projector",), 2: ("mm_projector", "llm")}
# of transformers' names; the rest is alike
RENAMES = (
    ("model.multi_modal_projector.linear_1", "mm_projector.0"),
    ("model.multi_modal_projector.linear_2", "mm_projector.2"),
    ("model.language_model.", "model."),
)


def gradient_row(context: Context, shape: Shape, stage: int) -> Row:
    """Every trained tensor's gradient beside transformers' autograd, float32, all blocks
    recomputing."""
    batch = batch_for(shape).on(context.device)
    hf = of_llava(context, torch.float32)
    # transformers puts the mean over labels of the whole batch, as we do
    loss = hf(**their_inputs(batch, hf, torch.float32), labels=batch.labels).loss
    loss.backward()
    theirs = {}
    for name, param in hf.named_parameters():
        for old, new in RENAMES:
            name = name.replace(old, new)
        theirs[name] = param.grad

    model = load_qilin(context.out / "whole", device=context.device)
    for name, param in model.named_parameters():
        param.requires_grad_(part_of(name) in STAGES[stage])
    model.train()
    model.model.n_checkpointed = shape.blocks
    our_loss = model(batch.ids, batch.pixel_values, batch.labels)
    our_loss.backward()
    worst = 0.0
    n_tensors = 0
    for name, param in model.named_parameters():
        if param.requires_grad:
            difference = (param.grad - theirs[name]).norm() / theirs[name].norm()
            worst = max(worst, difference.item())
            n_tensors += 1
    gap = abs(our_loss.item() - loss.item())
    return Row(
        f"gradients of stage {stage}, float32, beside transformers'",
        f"relative difference of a tensor, and loss, {LIMIT:.0e}",
        f"{worst:.1e} of {n_tensors} tensors, loss {gap:.1e}",
        worst <= LIMIT and gap <= LIMIT,
    )


# --- 3. low bits ----------------------------------------------------------------------------------


@torch.no_grad()
def low_bit_rows(context: Context, shape: Shape, bits: str) -> list[Row]:
    """Logits with rounded weights beside those of the same weights on the CPU. In bf16 the CPU's
    are of bf16 too: rounded once to bf16, a weight may have another nearest step."""
    texts = [text_ids(shape.text, seed, shape.vocabulary) for seed in (1, 2)]
    on_cpu = torch.tensor(texts)
    on_device = on_cpu.to(context.device)
    exact = parts(context, "mha", torch.float32)(on_device)
    noise = rms(parts(context, "mha", torch.bfloat16)(on_device) - exact)
    errors = {}
    rounding = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        files = {"llm": context.out / "mha", "vision": context.out / "clip"}
        want = load_qilin(**files, dtype=dtype, quantize=bits)(on_cpu).to(context.device)
        errors[dtype] = parts(context, "mha", dtype, bits)(on_device) - want
        rounding = max(rounding, rms(want - exact))
    worst = errors[torch.float32].abs().max().item()
    in_bf16 = rms(errors[torch.bfloat16])
    return [
        Row(
            f"logits with {bits} weights, float32, beside the CPU's",
            f"max difference {LIMIT:.0e} (what {bits} itself changes: rms {rounding:.1e})",
            f"{worst:.1e}",
            worst <= LIMIT < rounding,
        ),
        Row(
            f"logits with {bits} weights, bf16, beside the CPU's bf16",
            f"rms at most {WORSE} x what bf16 changes without them ({noise:.1e})",
            f"{in_bf16:.1e}",
            in_bf16 <= WORSE * noise,
        ),
    ]
