"""What the transformers that is installed makes of config.json files of LLaVA: run by
test_configs.py under 4.57 as well; stdin: a JSON list of them; stdout: as many readings."""

import json
import sys

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def reading(raw):
    """{is the head tied, RoPE's second frequency, rows of the embeddings}"""
    config = LlavaConfig(**raw)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    embeddings = model.get_input_embeddings().weight
    rope = LlamaRotaryEmbedding(config.text_config)
    return {
        "tied": model.get_output_embeddings().weight is embeddings,
        "frequency": rope.inv_freq[1].item(),
        "rows": len(embeddings),
    }


if __name__ == "__main__":
    json.dump([reading(raw) for raw in json.load(sys.stdin)], sys.stdout)
