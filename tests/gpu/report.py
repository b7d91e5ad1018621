"""report.md and report.json: the table, the figures, and where they were had."""

from pathlib import Path
from typing import Any

from common.files import write_json, write_text

HOLDS = {True: "yes", False: "NO", None: "-"}


def write_report(
    out: Path, about: dict[str, Any], results: dict[str, dict[str, Any]]
) -> tuple[str, int]:
    """Write both files. -> (the table as Markdown, rows that do not hold)"""
    rows = []
    for name, result in results.items():
        rows += [{"step": name, **row} for row in result["rows"]]
    n_failed = sum(row["holds"] is False for row in rows)
    lines = ["| check | expected | measured | holds |", "|---|---|---|---|"]
    for row in rows:
        cells = [clean(row[name]) for name in ("check", "expected", "measured")]
        lines.append(f"| {' | '.join(cells)} | {HOLDS[row['holds']]} |")
    table = "\n".join(lines)

    figures: dict[str, Any] = {}
    for result in results.values():
        figures.update(result["figures"])
    seconds = {name: result["seconds"] for name, result in results.items()}
    report = {**about, "seconds": seconds, "n_failed": n_failed, "rows": rows, "figures": figures}
    write_json(out / "report.json", report)
    write_text(out / "report.md", page(about, seconds, table, n_failed))
    return table, n_failed


def clean(text: str) -> str:
    """A cell of the table: one line, no bar."""
    return " ".join(text.split()).replace("|", "/")


def page(about: dict[str, Any], seconds: dict[str, float], table: str, n_failed: int) -> str:
    """report.md."""
    machine = about["machine"]
    gpus = [f"{gpu['name']} {gpu['gib']} GiB" for gpu in machine["gpus"]]
    lines = ["# tests/gpu.sh", ""]
    if not gpus:
        lines += ["**DRY RUN on a CPU at tiny sizes: no figure here is of a GPU**", ""]
    failed = f"- {n_failed} rows do not hold"
    if about["modes"]["quick"]:
        failed += "; without the long steps (--quick)"
    lines += [
        f"- {about['date']}, commit {about['commit'] or 'unknown'}",
        f"- {', '.join(gpus) or 'CPU'}; driver {machine['driver'] or '-'}",
        f"- torch {machine['torch']}, CUDA {machine['cuda'] or '-'}, "
        f"transformers {machine['transformers']}, Python {machine['python']}",
        f"- seconds: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}",
        failed,
        "",
        table,
        "",
    ]
    return "\n".join(lines)
