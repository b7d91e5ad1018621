"""Logits of a peft adapter on a llava-hf folder, by the transformers that is found first.

python peft_logits.py BASE ADAPTER IDS.pt LOGITS.pt
"""

import sys

import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration, __version__

base, adapter, inputs, out = sys.argv[1:]
model = LlavaForConditionalGeneration.from_pretrained(base)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    logits = model(**torch.load(inputs, weights_only=True)).logits
torch.save(logits, out)
print(__version__)
