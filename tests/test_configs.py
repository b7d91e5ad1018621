"""Promise: what a config.json says twice is read as transformers 4.57 and 5 read it, and refused
where they differ.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from read_configs import reading

import qilin_min as q

TOOL = ROOT / "tests/tools/read_configs.py"
HEADS = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4)
CONFIG = {
    "model_type": "llava",
    "text_config": dict(HEADS, model_type="llama", num_hidden_layers=1, vocab_size=320),
    "vision_config": dict(
        HEADS, model_type="clip_vision_model", num_hidden_layers=2, image_size=56, patch_size=14
    ),
}
DEFAULT = {"rope_type": "default"}
ROPE5 = {"rope_type": "default", "rope_theta": 5e5}

# (outside text_config, inside it) where both versions read alike
ALIKE = [
    ({}, {}),
    ({"tie_word_embeddings": False}, {}),
    ({}, {"tie_word_embeddings": True}),
    ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}),
    ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
    ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    ({"vocab_size": 500}, {}),
    ({"vocab_size": 320}, {"vocab_size": 500}),
    ({"rope_theta": 1e6}, {}),
    ({"rope_theta": 1e6}, {"rope_theta": 5e5}),
    ({"rope_parameters": ROPE5}, {}),
    ({}, {"rope_theta": 5e5}),
    ({}, {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None}),
    ({}, {"rope_theta": 5e5, "rope_scaling": DEFAULT}),
    ({}, {"rope_theta": 5e5, "rope_parameters": DEFAULT}),
    ({}, {"rope_theta": 5e5, "rope_parameters": ROPE5}),
]
# where they do not, and the word that the refusal holds
DIFFERENT = [
    ({"tie_word_embeddings": True}, {}, "tie_word_embeddings"),
    ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({}, {"rope_theta": 1e6, "rope_parameters": ROPE5}, "rope_theta"),
    ({}, {"rope_theta": 1e6, "rope_scaling": ROPE5}, "rope_theta"),
]


def config_of(outer, inner):
    raw = CONFIG | outer
    raw["text_config"] = CONFIG["text_config"] | inner
    # transformers writes into what it is given
    return copy.deepcopy(raw)


def our_reading(raw):
    text = q.text_config(q.inner_config(raw, Path("config.json")), Path("config.json"))
    pairs = torch.arange(0, text.head_dim, 2).float()
    return {
        "tied": text.tie_word_embeddings,
        "frequency": (1 / text.rope_theta ** (pairs / text.head_dim))[1].item(),
        "rows": text.vocab_size,
    }


@pytest.fixture(scope="module")
def readings_4():
    """Of transformers 4.57, of ALIKE, then of DIFFERENT: at once, it takes seconds to start."""
    target = os.environ.get("TRANSFORMERS_4")
    if not target:
        pytest.skip("TRANSFORMERS_4 names no folder with transformers 4.57.6 (tests/run.sh does)")
    done = subprocess.run(
        [sys.executable, TOOL],
        input=json.dumps([config_of(*case[:2]) for case in ALIKE + DIFFERENT]),
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=target),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def agree(one, two):
    return one == two | {"frequency": pytest.approx(two["frequency"], rel=1e-5)}


@pytest.mark.parametrize("outer, inner", ALIKE)
def test_transformers_5_reads_alike(outer, inner):
    assert agree(our_reading(config_of(outer, inner)), reading(config_of(outer, inner)))


def test_transformers_4_reads_alike(readings_4):
    for case, theirs in zip(ALIKE, readings_4[: len(ALIKE)], strict=True):
        assert agree(our_reading(config_of(*case)), theirs), case


@pytest.mark.parametrize("outer, inner, word", DIFFERENT)
def test_where_versions_differ_it_is_refused(outer, inner, word):
    with pytest.raises(ValueError, match=f"config.json: .*{word}.*transformers 4 and 5 decide"):
        our_reading(config_of(outer, inner))


def test_what_is_refused_is_what_they_read_differently(readings_4):
    for case, theirs in zip(DIFFERENT, readings_4[len(ALIKE) :], strict=True):
        assert not agree(theirs, reading(config_of(*case[:2]))), case


def test_what_only_transformers_5_writes_is_read_as_it_does():
    """4.57 takes its default of 10000 for it, whatever the model was trained with."""
    raw = config_of({}, {"rope_parameters": ROPE5})
    assert agree(our_reading(raw), reading(raw))
    assert our_reading(raw) == our_reading(config_of({}, {"rope_theta": 5e5}))
    null = config_of({}, {"rope_parameters": ROPE5, "rope_theta": None})
    assert our_reading(raw) == our_reading(null)


@pytest.mark.parametrize(
    "inner",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": dict(ROPE5, partial_rotary_factor=0.5)},
    ],
)
def test_a_part_that_is_not_rotated_is_refused(inner):
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        our_reading(config_of({}, inner))


def test_spellings_of_one_version_that_hide_each_other_are_refused():
    """rope_scaling hides rope_parameters from transformers 5, and neither is read by 4."""
    with pytest.raises(ValueError, match="rope_theta"):
        our_reading(config_of({}, {"rope_scaling": DEFAULT, "rope_parameters": ROPE5}))
