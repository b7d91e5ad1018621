"""What train.py --lora learnt, without its base -> a folder that peft loads onto a llava-hf model,
and that every command here takes as --model."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.files import folder_beside, write_json, write_text
from model_io.adapters import ADAPTER_CONFIG, ADAPTER_FILES
from model_io.export import (
    check_exportable,
    full_tensors,
    hf_tensors,
    is_rank0,
    save_tensors,
    whole,
    written_form,
)
from model_io.lowbit import QuantizedLinear, linear_layers
from model_io.written import check_file, check_json, check_place, fingerprint
from qilin_min import HfForm, Qilin, QilinConfig, activation_word, folder_config, hf_forms, part_of

# where peft finds our modules in the LlavaForConditionalGeneration of transformers 4.52 and later
PEFT_BLOCKS = "base_model.model.model.language_model.layers."
PEFT_PROJECTOR = "base_model.model.model."


def save_adapter(
    model: Qilin,
    path: str | Path,
    *,
    alpha: float,
    base: str,
    vision: str | None,
    dtype: torch.dtype,
    made_from: str,
) -> None:
    """Write a model's LoRA adapters (add_lora) and its projector as a peft adapter.

    alpha: of add_lora. base, vision: what it was trained on, as paths or hub names; vision None:
    the tower is in base. dtype: of the projector; the adapters keep their float32. made_from: for
    its README.md. On a sharded model every rank calls it; rank 0 writes, beside, reads it again,
    then renames. ValueError for a quantised base: what was learnt on rounded weights makes up for
    their rounding, and other weights have none.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("adapters of quantised weights belong to those: export them merged")
    check_exportable(model.config.projector_type)
    check_place(path)
    form = form_of_base(model.config, base)
    tensors = adapter_tensors(model, dtype, form)
    # rank 0 has them all
    if tensors:
        configs = {
            ADAPTER_CONFIG: adapter_config(model, alpha, base),
            "config.json": between_config(model, vision, form),
        }
        meant = {key: fingerprint(tensor) for key, tensor in tensors.items()}
        template = Path(__file__).with_name("adapter_card.md").read_text(encoding="utf-8")
        card = template.format(made_from=made_from, base=Path(base).name)
        with folder_beside(Path(path)) as folder:
            save_tensors(tensors, folder / ADAPTER_FILES[0])
            for file, content in configs.items():
                write_json(folder / file, content)
            write_text(folder / "README.md", card)
            check_file(folder / ADAPTER_FILES[0], meant)
            check_json(folder, configs)
    if dist.is_initialized():
        dist.barrier()


def form_of_base(config: QilinConfig, base: str) -> HfForm:
    """The form that the base's projector has, where it is there and a llava-hf folder: peft puts
    the adapter's into the same class, and its activation stays. Else what an export has."""
    if (Path(base) / "config.json").is_file():
        word = folder_config(base)[0].get("projector_hidden_act")
        for form in hf_forms(config.projector_type):
            if word == activation_word(config.projector_type, form):
                return form
    return written_form(config)


def adapter_tensors(model: Qilin, dtype: torch.dtype, form: HfForm) -> dict[str, torch.Tensor]:
    """{name that peft gives it: whole tensor on CPU}, the projector in a form; on ranks but the
    first empty."""
    tensors = {}
    for name, param in model.named_parameters():
        if part_of(name) != "lora":
            continue
        full = whole(param, torch.float32)
        if is_rank0():
            key = PEFT_BLOCKS + name.removeprefix("model.layers.") + ".weight"
            tensors[key] = full.cpu().contiguous()
    for name, full in full_tensors(model, "mm_projector.", dtype):
        if full is None:
            continue
        for key, tensor in hf_tensors(name, full, form, n_rows=0).items():
            tensors[PEFT_PROJECTOR + key] = tensor
    return tensors


def adapter_config(model: Qilin, alpha: float, base: str) -> dict[str, Any]:
    """adapter_config.json: what peft must know to put the tensors in their places."""
    layers = linear_layers(model)
    names = sorted({name for _, name, _ in layers})
    _, _, first = layers[0]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": first.lora_A.shape[0],
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        # not the tower's layers, some of which have the same names
        "target_modules": rf".*language_model\..*\.({'|'.join(names)})",
        "modules_to_save": ["multi_modal_projector"],
    }


def between_config(model: Qilin, vision: str | None, form: HfForm) -> dict[str, Any]:
    """config.json: what no base knows of the place between tower and words."""
    config = model.config
    raw = {
        "model_type": "llava",
        "projector_hidden_act": activation_word(config.projector_type, form),
        "vision_feature_layer": config.vision.select_layer,
        "image_aspect_ratio": config.image_mode,
    }
    if vision is not None:
        raw["mm_vision_tower"] = vision
    return raw
