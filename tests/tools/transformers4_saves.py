"""Run by test_forms.py under transformers 4.57: logits of a folder's model, which is then saved
again; argv: folder, file with ids and pixels, file for the logits, folder to save into."""

import sys

import torch
import transformers
from transformers import LlavaForConditionalGeneration


def main():
    folder, asked_file, logits_file, again = sys.argv[1:]
    assert transformers.__version__.startswith("4.57"), transformers.__version__
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    asked = torch.load(asked_file, weights_only=True)
    # a patch of a picture is a negative id of ours
    ids = torch.tensor([[i if i >= 0 else model.config.image_token_id for i in asked["ids"]]])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=asked["pixels"]).logits[0]
    torch.save(logits, logits_file)
    model.save_pretrained(again)


if __name__ == "__main__":
    main()
