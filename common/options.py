"""Options of commands: a number stands beside the range it must lie in."""

import argparse
from collections.abc import Sequence
from typing import Any


class InRange(argparse.Action):
    """An option's number with its limits:
    add("--epochs", action=InRange, type=int, low=1, high=100).

    A number outside them, nan too, is a ValueError, which ends a command in one line.
    """

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        low: float,
        high: float,
        **kwargs: Any,
    ):
        super().__init__(option_strings, dest, **kwargs)
        self.low = low
        self.high = high

    def __call__(self, parser, namespace, value, option_string=None):
        if not self.low <= value <= self.high:
            name = self.option_strings[0]
            raise ValueError(f"{name} {value}: must be from {self.low} to {self.high}")
        setattr(namespace, self.dest, value)
