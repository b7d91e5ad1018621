"""What carries data into the model and out of it."""

from model_io.export import save_qilin
from model_io.load import load_qilin
from model_io.pixels import open_image, preprocess_image
from model_io.tokens import Tokenizer, encode_conversation, encode_prompt

__all__ = [
    "Tokenizer",
    "encode_conversation",
    "encode_prompt",
    "load_qilin",
    "open_image",
    "preprocess_image",
    "save_qilin",
]
