"""Which parameters a stage trains: said once, for the run and for its plan."""

import torch.nn as nn

from qilin_min import part_of


def is_trained(name: str, trained: tuple[str, ...]) -> bool:
    """Whether a parameter is trained. trained: of PARTS, "lora", or beginnings of names
    ("model.layers.39.")."""
    if part_of(name) in trained:
        return True
    beginnings = tuple(word for word in trained if word.endswith("."))
    return name.startswith(beginnings)


def freeze(model: nn.Module, trained: tuple[str, ...]) -> None:
    """Only what is trained asks for gradients."""
    for name, param in model.named_parameters():
        param.requires_grad_(is_trained(name, trained))
