"""A model, sharded or not -> a llava-hf folder that transformers 4.57 and 5, vLLM and we load."""

import errno
import re
import shutil
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from common.files import check_replaceable, one_line, replace_folder, write_json, write_text
from model_io.lowbit import QuantizedLinear
from model_io.pixels import CLIP_MEAN, CLIP_STD
from model_io.tokens import SYSTEM
from qilin_min import EMBED, IMAGE_TOKEN, hf_name, part_of


def save_tensors(tensors, path):
    """A .safetensors file that others may read as they may its folder: the library alone makes it private to its owner."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk reaches us as a text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(
            int(number[1]) if number else errno.EIO,
            f"could not be written ({one_line(error)})",
            str(path),
        ) from None
    path.chmod(path.parent.stat().st_mode & 0o666)


SHARD_BYTES = 5_000_000_000


def full_tensors(model, names=None, dtype=None):
    """Yield (name, whole tensor on CPU) one by one; on a sharded model every rank must iterate, and rank 0 alone gets tensors, the others None.
    LoRA adapters are added to their layer's weight; that of a quantised layer is what its bits stood for in training, not what they were rounded from."""

    def whole(param, dtype):
        full = param.detach().to(dtype)  # cast first: half the traffic
        return full.full_tensor() if hasattr(full, "full_tensor") else full

    is_rank0 = not dist.is_initialized() or dist.get_rank() == 0
    for name, param in model.named_parameters():
        if part_of(name) != "lora" and (names is None or name.startswith(names)):
            layer = model.get_submodule(name.rpartition(".")[0])
            if hasattr(layer, "lora_A"):
                base = (
                    layer.dequantize(torch.float32)
                    if isinstance(layer, QuantizedLinear)
                    else whole(param, torch.float32)
                )
                full = (
                    base.float()
                    + layer.lora_scale
                    * (whole(layer.lora_B, torch.float32) @ whole(layer.lora_A, torch.float32))
                ).to(dtype or torch.float32)
            else:
                full = whole(param, dtype or param.dtype)
            yield name, full.cpu().contiguous() if is_rank0 else None


def save_qilin(model, tokenizer, path, dtype=None, made_from="weights in memory"):
    """Write `model` as a llava-hf folder: safetensors shards of at most 5 GB, config, tokenizer and processor files.

    tokenizer: a Tokenizer, or None (then no tokenizer files). dtype: of the floats on disk (None: as they are). made_from: for its README.md.
    On a sharded model every rank calls it; tensors are gathered one at a time and rank 0 writes, beside, then renames.
    The picture token is the first id past the tokenizer; rows are padded to a multiple of 64 with copies of <unk>'s.
    A linear projector has no llava-hf class: it is written as linear_1, an identity as linear_2, and a linear activation, which is equal.
    """
    config = model.config
    if any(
        isinstance(module, QuantizedLinear) and not hasattr(module, "lora_A")
        for module in model.modules()
    ):
        raise ValueError("a quantised model cannot be saved: load it without quantize")
    check_replaceable(path, "config.json")
    path, partial = Path(path), Path(path).with_name(Path(path).name + ".partial")
    is_rank0 = not dist.is_initialized() or dist.get_rank() == 0
    n_token_ids = tokenizer.vocab_size if tokenizer else config.n_token_ids
    n_rows = max(config.text.vocab_size, -(-(n_token_ids + 1) // 64) * 64)
    if is_rank0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    shards, sizes, shard, total = [], {}, {}, 0

    def close_shard():
        save_tensors(shard, partial / f"shard-{len(shards)}")
        shards.append(sorted(shard))
        shard.clear()

    for name, full in full_tensors(model, dtype=dtype):
        if not is_rank0:
            continue
        out = {hf_name(name): full}
        if name in (EMBED, "lm_head.weight"):
            out = {hf_name(name): torch.cat((full, full[:1].expand(n_rows - len(full), -1)))}
        elif config.projector_type == "linear" and name.startswith("mm_projector."):
            second = (
                torch.eye(len(full), dtype=full.dtype)
                if name.endswith("weight")
                else torch.zeros_like(full)
            )
            out[hf_name(name).replace("linear_1", "linear_2")] = second
        for key, tensor in out.items():
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
                close_shard()
            shard[key], sizes[key], total = tensor, tensor.nbytes, total + tensor.nbytes
    if is_rank0:
        close_shard()
        names = [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) > 1
            else "model.safetensors"
            for i in range(len(shards))
        ]
        for i, name in enumerate(names):
            (partial / f"shard-{i}").rename(partial / name)
        if len(shards) > 1:
            weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
            write_json(
                partial / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
            )
        dtype_name = str(dtype or next(model.parameters()).dtype).removeprefix("torch.")
        for file, value in hf_configs(config, n_token_ids, n_rows, dtype_name).items():
            write_json(partial / file, value)
        write_text(
            partial / "README.md",
            MODEL_CARD.format(
                made_from=made_from,
                n=sum(p.numel() for p in model.parameters()) / 1e9,
                dtype=dtype_name,
                projector=config.projector_type,
            ),
        )
        if tokenizer:
            save_tokenizer(tokenizer, partial)
        replace_folder(partial, path)
    if dist.is_initialized():
        dist.barrier()


MODEL_CARD = """---
language: [zh, en]
pipeline_tag: image-text-to-text
library_name: transformers
---
# A Qilin-Med-VL model

Made from {made_from} by qilin-min: CLIP ViT, a {projector} projector and a LLaMA-2 decoder, {n:.3g} billion parameters in {dtype}.

Research only. This model gives no medical advice, must not be used to diagnose or treat anyone, and may be wrong in every sentence.
仅供研究。本模型不提供医疗建议，不得用于诊断或治疗，其任何一句话都可能有误。

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration
processor, model = AutoProcessor.from_pretrained("."), LlavaForConditionalGeneration.from_pretrained(".")
messages = [{{"role": "user", "content": [{{"type": "image", "path": "image.png"}}, {{"type": "text", "text": "图中有什么异常？"}}]}}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=200)[0], skip_special_tokens=True))
```

or `python sample.py image.png "图中有什么异常？" --model .` with qilin-min, or `vllm serve .` for many users.

Licences: those of the parts hold. LLaMA-2 weights come under the LLaMA 2 Community License, CLIP's under MIT; data and fine-tuned parts under what their
sources say. Method: Qilin-Med-VL, arXiv 2310.17956; LLaVA, arXiv 2304.08485.
"""


def hf_configs(config, n_token_ids, n_rows, dtype_name):
    """The JSON files beside the weights: {file name: content}."""
    text, vision = config.text, config.vision
    text_json = {f.name: getattr(text, f.name) for f in fields(text)}
    ends = config.end_ids if text_json.pop("more_end_ids") else text.eos_token_id
    text_json.update(
        eos_token_id=ends,
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=n_rows,
        hidden_act="silu",
        torch_dtype=dtype_name,
    )
    vision_json = {
        f.name: getattr(vision, f.name) for f in fields(vision) if f.name != "select_layer"
    }
    vision_json.update(
        model_type="clip_vision_model", projection_dim=vision.hidden_size, torch_dtype=dtype_name
    )
    size, is_pad = (
        {"height": vision.image_size, "width": vision.image_size},
        config.image_mode == "pad",
    )
    return {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "torch_dtype": dtype_name,
            "image_token_index": n_token_ids,
            "image_seq_length": config.n_image_tokens,
            "tie_word_embeddings": text.tie_word_embeddings,
            "projector_hidden_act": "linear" if config.projector_type == "linear" else "gelu",
            "multimodal_projector_bias": True,
            "image_aspect_ratio": config.image_mode,
            "vision_feature_layer": vision.select_layer,
            "vision_feature_select_strategy": "default",
            "text_config": text_json,
            "vision_config": vision_json,
        },
        "generation_config.json": {  # filler rows and the picture token are never said
            "bos_token_id": text.bos_token_id,
            "eos_token_id": ends,
            "pad_token_id": 0,
            "suppress_tokens": list(range(n_token_ids, n_rows)),
        },
        "preprocessor_config.json": {
            "image_processor_type": "LlavaImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_pad": is_pad,
            "do_resize": True,
            "size": size if is_pad else {"shortest_edge": vision.image_size},
            "resample": 3,
            "do_center_crop": not is_pad,
            "crop_size": size,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "do_convert_rgb": True,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_TOKEN,
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    }


CHAT_TEMPLATE = (  # build_prompt as a Jinja template: pictures of a turn in front, each with a newline
    "{{ bos_token + '" + SYSTEM.replace("'", "\\'") + " ' }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' if loop.last and not text else '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{{ ' ASSISTANT:' }}"
    "{% else %}{{ ' ' }}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
)


def save_tokenizer(tokenizer, folder):
    """tokenizer.model, and tokenizer.json with the same pieces, which every transformers reads alike (given only the first, version 5
    encodes what follows <image> and </s> differently). The blank in front comes from a Prepend normaliser, once per text between control ids."""
    sp = tokenizer.sp
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = []
    for piece, i in vocab.items():
        if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i)):
            pairs = [
                (piece[:k], piece[k:])
                for k in range(1, len(piece))
                if piece[:k] in vocab and piece[k:] in vocab
            ]
            merges += [
                (-sp.get_score(i), vocab[left], vocab[right], left, right) for left, right in pairs
            ]
    added = [
        {
            "id": i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, content in (
            (0, sp.id_to_piece(0)),
            (1, sp.id_to_piece(1)),
            (2, sp.id_to_piece(2)),
            (sp.vocab_size(), IMAGE_TOKEN),
        )
    ]
    bos, bos_id = sp.id_to_piece(sp.bos_id()), sp.bos_id()
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "pre_tokenizer": None,
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            "post_processor": {
                "type": "TemplateProcessing",
                "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
                "single": [
                    {"SpecialToken": {"id": bos, "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [
                    {"SpecialToken": {"id": bos, "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"Sequence": {"id": "B", "type_id": 1}},
                ],
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": sp.id_to_piece(0),
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": [list(m[3:]) for m in sorted(merges)],
            },
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "bos_token": bos,
            "eos_token": sp.id_to_piece(sp.eos_id()),
            "unk_token": sp.id_to_piece(0),
            "pad_token": sp.id_to_piece(0),
            "clean_up_tokenization_spaces": False,
            "padding_side": "right",
            "image_token": IMAGE_TOKEN,
            "extra_special_tokens": {"image_token": IMAGE_TOKEN},
            "model_max_length": 2048,
        },
    )
    write_json(
        folder / "special_tokens_map.json",
        {
            "bos_token": bos,
            "eos_token": sp.id_to_piece(sp.eos_id()),
            "unk_token": sp.id_to_piece(0),
            "pad_token": sp.id_to_piece(0),
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
