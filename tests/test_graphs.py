"""Promise: a decoding step captured as a CUDA graph answers as the model does, and holds only what
a graph can hold.

No GPU is needed: what torch.cuda.graph captures is recorded here operation by operation, undone as
if it had not run, and replayed on the very same tensors, so that a number that the host put in, or
a tensor that was made anew, would show as on a GPU.
"""

import contextlib
import gc
import weakref

import pytest
import torch
from conftest import ROWS, make_qilin, pictures
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qilin_min as q
import sample
from model_io import graphs
from model_io.lowbit import linear_layers, quantize_linears

# the host reads what the GPU computed, or the shape of a result depends on it
WAITING = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "unique2",
    "equal",
    "is_nonzero",
}


class Recorder(TorchDispatchMode):
    """Keeps each operation; refuses those that a graph cannot hold."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{func} waits for the GPU"
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        devices = {x.device.type for x in given}
        if kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        assert len(devices) < 2, f"{func} carries between {devices}"
        if func._schema.is_mutable:
            self.before.append((args[0], args[0].clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def undo(self):
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def replay(self):
        for func, args, kwargs, out in self.calls:
            results = tree_leaves(func(*args, **kwargs))
            for new, old in zip(results, tree_leaves(out), strict=True):
                # views and what was written in place are what they were
                if torch.is_tensor(new) and new.data_ptr() != old.data_ptr():
                    assert new.shape == old.shape
                    old.copy_(new)


@pytest.fixture
def captured(monkeypatch):
    """Recorders in the place of CUDA's graphs, in the order of their making."""
    made = []

    def new_graph():
        made.append(Recorder())
        return made[-1]

    @contextlib.contextmanager
    def graph(recorder, stream, capture_error_mode):
        with recorder:
            yield
        recorder.undo()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(graphs, "N_EAGER_STEPS", 2)
    monkeypatch.setattr(graphs, "POSITIONS", 16)
    return made


def both_ways(model, *prompt, **options):
    """(answers of the model as it is, answers with captured steps)."""
    want = q.answer_ids(model, *prompt, **options)
    graphs.capture_decoding(model)
    got = q.answer_ids(model, *prompt, **options)
    graphs.launch_singly(model)
    return want, got


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("text", [{}, dict(num_key_value_heads=2)])
def test_answers_of_a_padded_batch_stay(captured, text, bits):
    """Rows of different lengths, one of which ends early; long enough to be captured anew."""
    model = make_qilin(text=text)
    if bits is not None:
        weights = [linear.weight for _, _, linear in linear_layers(model)]
        quantize_linears(model, bits)
        for (_, _, linear), weight in zip(linear_layers(model), weights, strict=True):
            linear.quantize_(weight.detach())
    model.config.text.eos_token_id = q.answer_ids(model, ROWS[:1], max_new_tokens=9)[0][7]
    want, got = both_ways(model, ROWS, pictures(3), max_new_tokens=40)
    assert got == want and len({len(row) for row in want}) > 1
    assert len(captured) >= 2


def test_drawn_answers_stay(captured):
    options = dict(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=3)
    want, got = both_ways(make_qilin(), ROWS, pictures(3), max_new_tokens=20, **options)
    assert got == want and captured


@torch.no_grad()
def test_logits_are_the_models(captured, report):
    """The only change is that attention reads masked positions too."""
    model = make_qilin()
    ids = q.pad_rows(ROWS, 0)
    lengths = torch.tensor([len(row) for row in ROWS])
    caches = [q.KVCache(2, 100), q.KVCache(2, 100)]
    decoder = graphs.GraphDecoder(model)
    one = torch.ones_like(lengths)
    for cache in caches:
        model(ids, pictures(3), cache=cache, lengths=lengths)
    worst = 0.0
    for step in range(30):
        new = torch.tensor([3, 4, 5]) + step
        want = model.decode(new, caches[0], one)
        got = decoder(new, caches[1], one)
        worst = max(worst, (got - want).abs().max())
        assert torch.equal(caches[0].lengths, caches[1].lengths)
        assert caches[0].n_positions == caches[1].n_positions
    assert captured
    report("logits of captured steps", worst, 1e-5)
    report("keys that captured steps stored", (caches[0].k - caches[1].k).abs().max(), 1e-5)


def test_a_chat_goes_on_with_its_graph(captured, tokenizer):
    """The cache is cut back and filled again between two turns, in the tensors the graph holds."""
    text = dict(vocab_size=32064, max_position_embeddings=400)
    model = make_qilin(text=text, n_token_ids=32000)
    graphs.capture_decoding(model)
    chat = sample.Chat(model, tokenizer, pictures(1))
    said = []
    for question in ("图中有什么？", "多大？", "在哪里？"):
        list(chat.ask(question, max_new_tokens=7))
        said.append(chat.answer.ids)
    n_captured = len(captured)
    chat.reset()
    list(chat.ask("图中有什么？", max_new_tokens=7))
    assert chat.answer.ids == said[0] and len(captured) == n_captured
    graphs.launch_singly(model)
    plain = sample.Chat(model, tokenizer, pictures(1))
    for question, ids in zip(("图中有什么？", "多大？", "在哪里？"), said, strict=True):
        list(plain.ask(question, max_new_tokens=7))
        assert plain.answer.ids == ids


def test_a_short_answer_is_not_captured(captured):
    want, got = both_ways(make_qilin(), ROWS, pictures(3), max_new_tokens=3)
    assert got == want and not captured


def test_a_step_that_cannot_be_captured_is_said_once(monkeypatch, capsys):
    def refuse():
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(graphs, "N_EAGER_STEPS", 2)
    want, got = both_ways(make_qilin(), ROWS, pictures(3), max_new_tokens=12)
    assert got == want
    assert capsys.readouterr().err.count("operation not permitted when stream is capturing") == 1


def test_a_model_is_freed_with_its_graphs(captured):
    model = make_qilin()
    graphs.capture_decoding(model)
    q.answer_ids(model, ROWS, pictures(3), max_new_tokens=12)
    gone = weakref.ref(model)
    gc.disable()
    del model
    assert gone() is None
    gc.enable()


@torch.no_grad()
def test_the_step_needs_no_values():
    """On the meta device, where every read of a value fails, and so does a tensor of the host."""
    model = make_qilin().to("meta")
    cache = q.KVCache(2, 64)
    ids = torch.zeros(3, 9, dtype=torch.int64, device="meta")
    lengths = torch.ones(3, dtype=torch.int64, device="meta")
    cache.lengths = torch.zeros_like(lengths)
    with Recorder() as recorder:
        logits = model.decode(ids[:, 0], cache, lengths)
    assert logits.shape == (3, model.config.text.vocab_size) and recorder.calls


def test_no_word_waits_for_a_plan_of_cudnn(captured, monkeypatch):
    """Each word brings a length that cuDNN has not seen; the question is left to torch's choice."""
    enabled = {"forward": set(), "decode": set()}

    def noting(name, function):
        def noted(*args, **named):
            enabled[name].add(torch.backends.cuda.cudnn_sdp_enabled())
            return function(*args, **named)

        return noted

    model = make_qilin()
    monkeypatch.setattr(q.Qilin, "decode", noting("decode", q.Qilin.decode))
    monkeypatch.setattr(q.LlamaModel, "forward", noting("forward", q.LlamaModel.forward))
    graphs.capture_decoding(model)
    q.answer_ids(model, [[1, 5, 9]], max_new_tokens=5)
    assert enabled["decode"] == {False}
    # of the question, and of each word
    assert enabled["forward"] == {True, False}
    assert torch.backends.cuda.cudnn_sdp_enabled()
