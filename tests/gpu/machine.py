"""What this machine is, and what it reaches: later shares are of these figures."""

import torch

from gpu.table import Context, Row


def machine(context: Context) -> list[Row]:
    """Name and memory."""
    return [Row("torch", "2.11 or newer", torch.__version__, True)]
