"""The toy world that several steps train on, made once for all of them, and a model trained on
it."""

from pathlib import Path

from gpu.processes import finish, on_device, train_words
from gpu.table import Context


def shared_folder(context: Context) -> Path:
    """Beside the folders of the steps; what runs the steps removes it when code or machine is
    another."""
    folder = context.out.parent.parent / "world"
    folder.mkdir(exist_ok=True)
    return folder


def toy_world(context: Context) -> Path:
    """The folder that `python -m demo.toy` makes."""
    toy = shared_folder(context) / "toy"
    if not toy.exists():
        words: list[object] = ["demo.toy", toy]
        words += ["--language", 64 if context.is_dry else 1600]
        words += ["--alignment", 64]
        words += ["--instruction", 64 if context.is_dry else 1600]
        words += ["--heldout", 4 if context.is_dry else 40]
        finish(context, "toy", *words)
    return toy


def trained_model(context: Context) -> Path:
    """A model whose answers are no noise: sentences and questions about pictures, together."""
    toy = toy_world(context)
    out = shared_folder(context) / "answers"
    data = (toy / "language.json", toy / "instruction.json")
    start = ("--llm", toy / "llama", "--vision", toy / "clip")
    words = train_words(2, toy, out, data, start)
    words += ["--batch-size", 16, "--lr", 3e-3, "--epochs", 6 if context.is_dry else 3]
    words += on_device(context.device.type)
    finish(context, out.name, *words)
    return out / "final"
