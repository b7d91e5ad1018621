"""Reads demo.sh's last line on stdin; exit 1 unless it shows learning that needs the picture, in under five minutes."""

import re
import sys

line = sys.stdin.read().strip()
numbers = re.fullmatch(
    r"demo: stage1 (\S+) -> (\S+), stage2 (\S+) -> (\S+), accuracy (\S+), blind (\S+), (\d+) questions, (\d+) seconds",
    line,
)
if not numbers:
    sys.exit(f"not the demo's last line: {line!r}")
a, b, c, d, accuracy, blind, n, seconds = map(float, numbers.groups())
failed = [
    name
    for name, ok in {
        "stage 1 lowers the held-out caption loss to under 0.8 of the fresh projector's": b
        < 0.8 * a,
        "stage 2 lowers the held-out loss": d < c,
        "accuracy at least 0.85": accuracy >= 0.85,
        "35 points above blind": accuracy - blind >= 0.35,
        "at least 200 questions": n >= 200,
        "under 300 seconds": seconds < 300,
    }.items()
    if not ok
]
sys.exit("; ".join(failed) or 0)
