"""What is trained: words of a stage's row -> the parameters that learn, all others frozen."""

import re
from collections.abc import Iterable

from qilin_min import Qilin, part_of

# what may be trained; the vision tower is none of it: the model computes it without gradients
WORDS = (
    "mm_projector",
    "llm (all of the language model)",
    "llm.layers.A:B (some of its blocks, cut as a Python list is: llm.layers.-2: are the last two)",
    "lora (its adapters)",
)
SOME_BLOCKS = re.compile(r"llm\.layers\.(-?\d+)?:(-?\d+)?")
BLOCK_NUMBER = re.compile(r"model\.layers\.(\d+)\.")


def check_trained(trained: Iterable[str]) -> None:
    """ValueError unless each word is one of WORDS."""
    for word in trained:
        is_known = word in ("mm_projector", "llm", "lora") or SOME_BLOCKS.fullmatch(word)
        if not is_known:
            raise ValueError(f"{word!r} is nothing that can be trained: {'; '.join(WORDS)}")


def is_llm_tuned(trained: Iterable[str]) -> bool:
    """Whether weights of the language model itself are trained, all or some."""
    return any(word.split(".")[0] == "llm" for word in trained)


def tuned_blocks(trained: Iterable[str], n_blocks: int) -> set[int]:
    """Numbers of the decoder blocks that `llm.layers.A:B` names. ValueError when it names none."""
    numbers = set()
    for word in trained:
        some = SOME_BLOCKS.fullmatch(word)
        if some is None:
            continue
        start, stop = (int(edge) if edge else None for edge in some.groups())
        named = range(n_blocks)[start:stop]
        if not named:
            raise ValueError(f"{word} is none of the {n_blocks} blocks of the language model")
        numbers.update(named)
    return numbers


def trained_names(model: Qilin, trained: Iterable[str]) -> set[str]:
    """Names of the parameters that words of WORDS stand for. ValueError for another word."""
    words = tuple(trained)
    check_trained(words)
    numbers = tuned_blocks(words, len(model.model.layers))
    names = set()
    for name, _ in model.named_parameters():
        part = part_of(name)
        block = BLOCK_NUMBER.match(name)
        is_in_block = part == "llm" and block is not None and int(block[1]) in numbers
        if part in words or is_in_block:
            names.add(name)
    return names


def freeze(model: Qilin, trained: Iterable[str]) -> None:
    """Let exactly the parameters learn that `trained` stands for, words of WORDS."""
    names = trained_names(model, trained)
    for name, param in model.named_parameters():
        param.requires_grad_(name in names)
