"""What bench_rows.py measured, as a table, as JSON and as a picture."""

import json
import platform
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_rows import Measured

# of /proc/cpuinfo, what decides the speed of products
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")


def describe_machine() -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    held = set(flags[1].split()) if flags else set()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": name[1] if name else platform.processor(),
        "instructions": [word for word in INSTRUCTIONS if word in held],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


HEAD = """| work | ours | peer | ratio | goal | memory ours | memory peer |
|---|---|---|---|---|---|---|"""


def table_row(row: Measured) -> str:
    sign = "at most" if row.is_time else "at least"
    memory = ["", ""]
    if row.memory_ours is not None and row.memory_peer is not None:
        memory = [f"{row.memory_ours:.0f} MiB", f"{row.memory_peer:.0f} MiB"]
    cells = [
        row.work,
        f"{row.ours:.3g} {row.unit}",
        f"{row.theirs:.3g} {row.unit}, {row.peer}",
        f"{row.ratio:.2f}",
        f"{sign} {row.goal:g}" + ("" if row.is_met else ", missed"),
        *memory,
    ]
    return "| " + " | ".join(cells) + " |"


def machine_line(machine: dict[str, Any]) -> str:
    words = ", ".join(machine["instructions"]) or "no vector instructions known"
    return (
        f"{machine['date']}, {machine['cpu']} ({words}), {machine['threads']} threads, "
        f"torch {machine['torch']}"
    )


def write_json(rows: list[Measured], machine: dict[str, Any], path: Path) -> None:
    found = [asdict(row) | {"is_met": row.is_met} for row in rows]
    path.write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n")


def write_picture(rows: list[Measured], machine: dict[str, Any], path: Path) -> None:
    """How much faster than its peer each work is, and where its goal lies."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1 + 0.32 * len(rows)))
    for place, row in enumerate(rows):
        gain = 1 / row.ratio if row.is_time else row.ratio
        goal = 1 / row.goal if row.is_time else row.goal
        axes.barh(place, gain, color="#2a7" if row.is_met else "#c63")
        axes.plot([goal, goal], [place - 0.4, place + 0.4], color="black")
    axes.set_yticks(range(len(rows)), [f"{row.work} / {row.peer}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("times as fast as the peer; black: the goal")
    axes.set_title(machine_line(machine), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
