"""Answers of a trained toy model on the device beside the CPU's."""

import torch

from common.files import read_json
from gpu.table import Context, Row
from gpu.world import toy_world, trained_model
from model_io.load import load_qilin
from model_io.pixels import preprocess_image
from model_io.tokens import Tokenizer, encode_prompt
from qilin_min import answer_ids


def answers(context: Context) -> list[Row]:
    """A trained toy model's answers about unseen pictures, greedy, beside the CPU's."""
    toy = toy_world(context)
    folder = trained_model(context)
    tokenizer = Tokenizer(folder)
    on_cpu = load_qilin(folder)
    config = on_cpu.config
    asked = read_json(toy / "heldout.json")[: 10 if context.is_dry else 200]
    prompts = []
    pictures = []
    for row in asked:
        prompts.append(encode_prompt(row["conversations"][:1], tokenizer, config.n_image_tokens))
        pictures.append(preprocess_image(toy / "images" / row["image"], config.vision.image_size))
    # (n, 3, H, W)
    pictures = torch.stack(pictures)
    want = answer_ids(on_cpu, prompts, pictures, max_new_tokens=24)
    truths = [row["conversations"][1]["value"] for row in asked]
    n_right = sum(
        tokenizer.decode(ids).strip() == truth for ids, truth in zip(want, truths, strict=True)
    )
    equal = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_qilin(folder, device=context.device, dtype=dtype)
        got = answer_ids(model, prompts, pictures, max_new_tokens=24)
        equal[dtype] = sum(a == b for a, b in zip(got, want, strict=True))
    n = len(want)
    kinds = len({tuple(ids) for ids in want})
    about = f"{n} questions, {kinds} different answers, {n_right} of them right"
    return [
        Row(
            "ids of a trained toy model's answers, float32, beside the CPU's",
            f"all equal ({about})",
            f"{equal[torch.float32]} of {n}",
            equal[torch.float32] == n and kinds > 1,
        ),
        Row("the same in bf16", "-", f"{equal[torch.bfloat16]} of {n}", None),
    ]
