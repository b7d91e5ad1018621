"""bench.py's table says of each row whether its goal was met, fails where one was not, and loses no
row that was measured."""

import json

import bench
import bench_rows
import pytest
from bench_rows import Measured
from bench_table import table_row

FAST = Measured("work", "peer", "s", 1.0, 2.0, 0.5, goal=0.6, is_time=True)
SLOW = Measured("other", "peer", "tokens/s", 10.0, 20.0, 0.5, goal=0.6, is_time=False)
FAT = Measured("fat", "peer", "s", 1.0, 2.0, 0.5, 0.6, True, 70.0, 100.0, memory_goal=0.6)


def test_times_must_be_below_and_rates_above_their_goal():
    assert [row.is_met for row in (FAST, SLOW, FAT)] == [True, False, False]
    assert table_row(FAST) == "| work | 1 s | 2 s, peer | 0.50 | at most 0.6 |  |  |"
    assert "at least 0.6, missed" in table_row(SLOW)
    assert table_row(FAT).endswith("| 70 MiB | 100 MiB |")


def test_works_alternate_and_ratios_are_of_pairs():
    calls = []
    works = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    found = bench_rows.in_turn(works, 2)
    # a round that does not count, then each the other way round
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert found == {"a": [3, 6], "b": [4, 5]}
    assert bench_rows.ratio_of([1.0, 8.0, 3.0], [1.0, 4.0, 1.0]) == 2.0


@pytest.mark.parametrize("rows, code", [([FAST], 0), ([FAST, SLOW], 1)])
def test_a_missed_goal_fails_and_all_is_written(rows, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "ROWS", {"some": lambda runs: iter(rows), "unasked": None})
    monkeypatch.setattr("sys.argv", ["bench.py", "some", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == code
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [row["is_met"] for row in found["rows"]] == [row.is_met for row in rows]
    assert found["machine"]["cpu"] in capsys.readouterr().out
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_that_breaks_leaves_those_before_it(monkeypatch, tmp_path):
    def breaking(runs):
        yield FAST
        raise RuntimeError("no llama.cpp")

    monkeypatch.setattr(bench, "ROWS", {"some": breaking})
    with pytest.raises(RuntimeError):
        bench.bench_table(["some"], 1, tmp_path)
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 1


def test_an_unknown_row_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "decoed"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2 and "decoed is no row: stage2" in capsys.readouterr().err


def test_a_call_is_charged_for_what_it_takes_at_its_peak():
    def take():
        bytearray(64 * 2**20)

    assert 60 < bench_rows.extra_memory(take) < 80
