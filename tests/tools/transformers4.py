"""Run by test_convert.py under transformers 4.57: loads a folder as users would and saves what it
saw; argv: folder, question file, image, output."""

import json
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration


def answer(model, processor, question, image):
    """Of one question with its <image>s: input ids, pixels and logits."""
    n = question.count("<image>")
    text = question.replace("<image>", "").strip()
    content = [{"type": "image"}] * n + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(
        text=prompt.removeprefix("<s>"),
        images=[Image.open(image)] * n or None,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    return {
        "ids": inputs["input_ids"][0],
        "pixels": inputs.get("pixel_values"),
        "logits": logits,
    }


def main():
    folder, questions, image, out = sys.argv[1:]
    assert transformers.__version__.startswith("4.57"), transformers.__version__
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    model.eval()
    processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    with open(questions, encoding="utf-8") as file:
        rows = [answer(model, processor, question, image) for question in json.load(file)]
    seen = {"info": {name: list(keys) for name, keys in info.items()}, "rows": rows}
    torch.save(seen, out)


if __name__ == "__main__":
    main()
