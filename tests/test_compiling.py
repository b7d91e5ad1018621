"""Promise: compiled blocks train as eager ones do, under their own names, and no length, batch or
look at held-out data brings a run near the limit past which torch runs eagerly.
"""

from functools import partialmethod

import pytest
import torch
from torch._dynamo.utils import counters

import qilin_min as q
import train
from training import compiling
from training.log import drop_gathered
from training.ranks import setup_distributed

TEXT = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=256,
)
STAGE_2 = ("mm_projector", "llm")
CUDA = torch.device("cuda")


@pytest.fixture
def group(monkeypatch):
    setup_distributed()
    # all of torch.compile but the last part, which writes C++
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(whole, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch.distributed.destroy_process_group()


def sharded(trained, is_compiled):
    config = q.QilinConfig(q.TextConfig(**TEXT), q.VisionConfig(64, 96, 3, 4, 56, 14))
    with torch.device("meta"):
        model = q.Qilin(config)
    device = torch.device("cpu")
    model = train.shard_model(model, device, trained, torch.float32, is_compiled=is_compiled)
    model._apply(lambda t: torch.empty_like(t, device=device))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            local = param.to_local() if hasattr(param, "to_local") else param
            local.normal_(0, 0.05, generator=generator)
    return model.train()


def a_loss(model, rows, tokens, n_checkpointed):
    ids = torch.arange(3, 3 + rows * tokens).remainder(300).view(rows, tokens)
    model.model.n_checkpointed = n_checkpointed
    return model(ids, None, ids, reduction="sum")


def look(model, rows, tokens):
    model.eval()
    with torch.no_grad():
        a_loss(model, rows, tokens, 0)
    drop_gathered(model)
    model.train()


def test_a_whole_run_makes_few_entries(group):
    model = sharded(("mm_projector", "llm.layers.-2:"), is_compiled=True)
    for rows, tokens, n_checkpointed in (
        (4, 40, 0),
        (4, 44, 2),
        (3, 50, 3),
        (1, 47, 1),
        (1, 49, 0),
    ):
        a_loss(model, rows, tokens, n_checkpointed).backward()
    for rows, tokens in ((4, 50), (2, 34), (1, 33)):
        look(model, rows, tokens)
    for rows, tokens in ((5, 60), (2, 90), (1, 80)):
        a_loss(model, rows, tokens, 3).backward()
        look(model, rows, tokens)
    # recomputed or not, frozen or trained, one row or more, with gradients or without
    assert 0 < counters["stats"]["unique_graphs"] <= 2**4 < compiling.MOST_ENTRIES
    assert not counters["graph_break"]


def test_compiled_blocks_train_as_eager_ones(group):
    gradients = []
    for is_compiled in (False, True):
        model = sharded(STAGE_2, is_compiled)
        a_loss(model, 3, 40, 1).backward()
        gradients.append(
            {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
        )
    assert counters["stats"]["unique_graphs"] > 0
    eager, compiled = gradients
    assert eager.keys() == compiled.keys()
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_default_is_on_cuda_where_it_can_be(monkeypatch):
    monkeypatch.setattr(compiling, "missing_for_cuda", lambda: None)
    assert compiling.choose_compiling(None, CUDA, False) == (True, None)
    assert compiling.choose_compiling(None, torch.device("cpu"), False) == (False, None)
    assert compiling.choose_compiling(False, CUDA, False) == (False, None)
    assert compiling.choose_compiling(True, torch.device("cpu"), True) == (True, None)
    is_compiled, line = compiling.choose_compiling(None, CUDA, True)
    assert not is_compiled and "quantised" in line
    monkeypatch.setattr(compiling, "missing_for_cuda", lambda: "triton is not installed")
    is_compiled, line = compiling.choose_compiling(None, CUDA, False)
    assert not is_compiled and "triton" in line


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert "triton" in compiling.missing_for_cuda()
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert "compiler" in compiling.missing_for_cuda()
