"""Run by test_convert.py under transformers 4.57: loads a folder as users would and saves what it saw; argv: folder, question file, image, output."""

import json
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder, questions, image, out = sys.argv[1:]
assert transformers.__version__.startswith("4.57"), transformers.__version__
model, info = LlavaForConditionalGeneration.from_pretrained(
    folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
)
processor = AutoProcessor.from_pretrained(folder, use_fast=False)
seen = {"info": {k: list(v) for k, v in info.items()}, "rows": []}
for question in json.load(open(questions, encoding="utf-8")):
    n = question.count("<image>")
    content = [{"type": "image"}] * n + [
        {"type": "text", "text": question.replace("<image>", "").strip()}
    ]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(
        text=prompt.removeprefix("<s>"), images=[Image.open(image)] * n or None, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0]
    seen["rows"].append(
        {"ids": inputs["input_ids"][0], "pixels": inputs.get("pixel_values"), "logits": logits}
    )
torch.save(seen, out)
