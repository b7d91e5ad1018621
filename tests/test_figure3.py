"""Promise: docs/figure3.svg is what draw_figure3.py draws, and its numbers are those of
the code."""

import sys
from dataclasses import replace

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/tools"))

from draw_figure3 import drawing, paper_config

from train import STAGES


def test_the_drawing_in_docs_is_the_one_that_is_drawn():
    drawn = drawing(STAGES, paper_config())
    assert (ROOT / "docs/figure3.svg").read_text(encoding="utf-8") == drawn


def test_its_numbers_are_those_of_the_paper():
    """By hand: the adapter is 1024 x 5120 weights and 5120 biases, 5,248,000; the language model
    of 13B is 13,015,864,320. Stage 1 trains the first, stage 2 both."""
    first, second = drawing(STAGES, paper_config()).split("Stage 2:")
    for half in (first, second):
        assert "576 × 1024" in half and "576 × 5120" in half
        assert "5.2 M" in half and "13.02 B" in half
    assert "580,014" in first and "batch 批 256" in first and "lr 学习率 0.001" in first
    assert "469,441" in second and "batch 批 128" in second and "lr 学习率 2e-05" in second
    assert first.count("frozen 冻结") == 2 and first.count("trained 训练<") == 1
    assert second.count("frozen 冻结") == 1 and second.count("trained 训练<") == 2


def test_other_stages_and_sizes_are_drawn_otherwise():
    config = paper_config()
    before = drawing(STAGES, config)
    frozen = {**STAGES, 2: replace(STAGES[2], trained=("mm_projector",), batch_size=64)}
    after = drawing(frozen, config)
    assert after.count("frozen 冻结") == before.count("frozen 冻结") + 1 and "batch 批 64" in after
    wide = replace(config, text=replace(config.text, hidden_size=2560))
    assert "576 × 2560" in drawing(STAGES, wide)
