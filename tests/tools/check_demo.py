"""Reads demo.sh's last line on stdin; exit 1 unless it shows learning that needs the picture, in
under five minutes."""

import re
import sys

LAST_LINE = re.compile(
    r"demo: stage1 (\S+) -> (\S+), stage2 (\S+) -> (\S+),"
    r" accuracy (\S+), blind (\S+), (\d+) questions, (\d+) seconds"
)


def main():
    line = sys.stdin.read().strip()
    numbers = LAST_LINE.fullmatch(line)
    if not numbers:
        sys.exit(f"not the demo's last line: {line!r}")
    fresh, aligned, before, after, accuracy, blind, n, seconds = map(float, numbers.groups())
    promises = {
        "stage 1 lowers the held-out caption loss to under 0.8 of the fresh projector's": (
            aligned < 0.8 * fresh
        ),
        "stage 2 lowers the held-out loss": after < before,
        "accuracy at least 0.85": accuracy >= 0.85,
        "35 points above blind": accuracy - blind >= 0.35,
        "at least 200 questions": n >= 200,
        "under 300 seconds": seconds < 300,
    }
    broken = [promise for promise, is_kept in promises.items() if not is_kept]
    sys.exit("; ".join(broken) or 0)


if __name__ == "__main__":
    main()
