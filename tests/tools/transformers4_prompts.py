"""Run by test_prompts.py under transformers 4.57: what a folder's processor makes of messages;
argv: folder, file with a list of {"messages", "add_generation_prompt"}, output: {"text", "ids"} or
{"error"} of each."""

import json
import sys

import transformers
from transformers import AutoProcessor


def prompt_of(processor, messages, add_generation_prompt):
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    # jinja2's TemplateError, which is no dependency of ours
    except Exception as error:
        return {"error": str(error)}
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"text": text, "ids": ids}


def main():
    folder, questions, out = sys.argv[1:]
    assert transformers.__version__.startswith("4.57"), transformers.__version__
    processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    with open(questions, encoding="utf-8") as file:
        asked = json.load(file)
    answers = [prompt_of(processor, **question) for question in asked]
    with open(out, "w", encoding="utf-8") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
