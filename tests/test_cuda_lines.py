"""Promise: each line that only a GPU reaches does what it is there for, on a machine of 8 A100 that
is told of but not there: torch.cuda answers as theirs would, and notes what it is told."""

import importlib.util
import re
import sys
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, make_qilin
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import qilin_min as q
import train
from common.files import read_json
from demo import toy
from evaluation import systems
from model_io import devices, load, lowbit, lowbit_kernels
from training import batches, checkpoints, log, plan, ranks
from training.costs import GIB, count_sizes

GPU = torch.device("cuda", 3)


class Gpus:
    """What torch.cuda says of 8 A100, and `told`: what it was asked to do, in order."""

    def __init__(self):
        self.name = "NVIDIA A100-SXM4-80GB"
        self.has_bfloat16 = True
        self.memory = 80 * GIB
        self.told: list[tuple[Any, ...]] = []
        self.state = torch.arange(16, dtype=torch.uint8)

    def stubs(self):
        return dict(
            is_available=lambda: True,
            device_count=lambda: 8,
            get_device_name=lambda device=None: self.name,
            get_device_properties=lambda device: SimpleNamespace(total_memory=self.memory),
            is_bf16_supported=self.is_bf16_supported,
            max_memory_allocated=lambda device=None: 51 * GIB,
            max_memory_reserved=lambda device=None: 54 * GIB,
            get_rng_state=lambda: self.state,
            set_rng_state=lambda state: self.told.append(("set_rng_state", state)),
            set_device=lambda device: self.told.append(("set_device", device)),
            empty_cache=lambda: self.told.append(("empty_cache",)),
        )

    def is_bf16_supported(self, including_emulation=True):
        # what is emulated is there on any of them
        return including_emulation or self.has_bfloat16


@pytest.fixture
def gpus(monkeypatch):
    found = Gpus()
    for name, stub in found.stubs().items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield found
    for flag, was_allowed in zip(flags, before, strict=True):
        flag.allow_tf32 = was_allowed


def other_device(device):
    """torch's functions that make tensors, for a device that is not there: the CPU's in its
    place."""
    return torch.device("cpu") if torch.device(device).type in ("cuda", "mps") else device


# --- train.py -------------------------------------------------------------------------------------


def test_a_rank_takes_its_gpu_before_it_joins(gpus, monkeypatch):
    """Joined first, NCCL would take GPU 0 on every rank. Gloo stands beside it: objects, and
    checkpoints in the background."""

    def join(backend, **named):
        gpus.told.append(("join", backend))

    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("RANK", raising=False)
    assert ranks.setup_distributed() == (3, 8, GPU)
    assert gpus.told == [("set_device", GPU), ("join", "cpu:gloo,cuda:nccl")]
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_torchruns_ranks_join_with_both_backends(gpus, monkeypatch):
    joined = []

    def join(backend, **named):
        joined.append((backend, named["rank"], named["world_size"], named["timeout"]))

    store = dist.HashStore()
    monkeypatch.setattr(ranks, "rendezvous", lambda *_, **__: iter([(store, 3, 8)]))
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    ranks.setup_distributed()
    assert joined == [("cpu:gloo,cuda:nccl", 3, 8, timedelta(minutes=30))]


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA GeForce RTX 4090", 165),
        ("A card of next year", None),
    ],
)
def test_the_machine_is_what_cuda_says(gpus, monkeypatch, name, tflops):
    """The peak of its name, an A100's and said to be unknown for another name; memory of the
    smallest GPU, of which 8 GiB are left."""
    gpus.name = name
    monkeypatch.setattr(plan, "gather", lambda value: [value, 24 * GIB])
    asked = dict(gpu_memory=None, gpu_tflops=None, bandwidth=2e11)
    machine = plan.this_machine(GPU, **asked, replicate=2)
    assert machine.flops == (tflops or 312) * 1e12
    assert machine.is_peak_known == (tflops is not None)
    assert machine.memory == 24 * GIB
    assert machine.budget == 16 * GIB
    assert (machine.world_size, machine.n_shards) == (8, 4)
    monkeypatch.setattr(plan, "gather", lambda value: [value])
    machine = plan.this_machine(GPU, **asked, replicate=1)
    assert machine.memory == 80 * GIB


def test_the_log_tells_of_the_gpu(gpus, tmp_path):
    assert log.used_memory(GPU) == 51 * GIB
    assert log.reserved_memory(GPU) == 54 * GIB
    assert log.reserved_memory(torch.device("cpu")) is None
    log.write_run_json(tmp_path, arguments={}, n_params={}, data={}, start=0)
    assert read_json(tmp_path / "run.json")["device"] == gpus.name


@pytest.mark.parametrize(
    "device, asked, dtype",
    [
        (GPU, "auto", "bfloat16"),
        (torch.device("cpu"), "auto", "what is measured"),
        (GPU, "float32", "float32"),
        (torch.device("cpu"), "bfloat16", "bfloat16"),
    ],
)
def test_what_is_computed_in(device, asked, dtype, monkeypatch):
    monkeypatch.setattr(train, "on_rank0", lambda call, *given: call(*given))
    monkeypatch.setattr(train, "print0", print)
    monkeypatch.setattr(train, "default_dtype", lambda device: ("what is measured", "why"))
    assert train.choose_dtype(asked, device) == dtype


def test_the_mesh_is_of_gpus(gpus, monkeypatch):
    meshes = []
    groups = []

    def make_mesh(kind, shape, **named):
        meshes.append((kind, shape))
        return "mesh"

    monkeypatch.setattr(train, "init_device_mesh", make_mesh)
    monkeypatch.setattr(train, "fully_shard", lambda module, **how: groups.append(how))
    for replicate in (1, 2):
        train.shard_model(make_qilin(), GPU, ("mm_projector",), torch.bfloat16, replicate=replicate)
    assert meshes == [("cuda", (8,)), ("cuda", (2, 4))]
    for how in groups:
        policy = how["mp_policy"]
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_batches_go_to_the_gpu_beside_its_work(gpus, monkeypatch):
    """Pinned by the loader and copied without waiting, which from pageable memory no copy can."""
    asked = {}

    class Loader:
        def __init__(self, dataset, **named):
            asked.update(named)

        def __iter__(self):
            return iter(())

    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    batches.load_ahead([], [], workers=2)
    assert asked["pin_memory"] is True

    class Pinned:
        def to(self, device, non_blocking=False):
            return device, non_blocking

    counts = dict(n_image_positions=0, n_labels=3)
    batch = dict(input_ids=Pinned(), pixel_values=None, labels=Pinned(), grey=[], **counts)
    there = (GPU, True)
    moved = dict(input_ids=there, pixel_values=None, labels=there, **counts)
    assert batches.to_device(batch, GPU) == moved


def test_a_checkpoint_keeps_the_gpus_random_numbers(gpus, monkeypatch, tmp_path):
    """And gives them back; one of a CPU has none to give."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    own: Any = SimpleNamespace(model=model, optimizer=optimizer, group=None)
    held = checkpoints.Checkpoints.tensors(own)
    assert held["rng"]["cuda-3"].equal(gpus.state)

    for name in ("load_sharded", "check_metadata", "set_state_dict"):
        monkeypatch.setattr(checkpoints, name, lambda *_, **__: None)
    monkeypatch.setattr(checkpoints, "together", lambda function, *values: function(*values))
    own.tensors = lambda with_rng: held
    checkpoints.Checkpoints.load(own, tmp_path, with_rng=False)
    assert gpus.told == []
    checkpoints.Checkpoints.load(own, tmp_path, with_rng=True)
    assert gpus.told == [("set_rng_state", held["rng"]["cuda-3"])]
    del held["rng"]["cuda-3"]
    checkpoints.Checkpoints.load(own, tmp_path, with_rng=True)
    assert len(gpus.told) == 1


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "--checkpoint-l"),
        (RuntimeError("NCCL communicator was aborted on rank 3"), "newest checkpoint"),
        (dist.DistBackendError("ncclRemoteError: a call failed"), "newest checkpoint"),
    ],
)
def test_what_ends_a_run_on_gpus_is_answered(error, words):
    hint = train.hint_for(error)
    assert hint is not None and words in hint


def test_places_are_found_on_the_host_of_a_mac():
    """torch 2.11 has no kernel for that there: a picture's question would end in its error."""
    found = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "nonzero" in str(func) or "assert_async" in str(func):
                found.append(args[0].device.type)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Seen():
        places = q.places_of(torch.ones(2, 5, dtype=torch.bool, device="mps"), 10)
    assert found == ["cpu", "cpu"]
    assert (places.device.type, places.shape) == ("mps", (10,))


# --- commands that open a model -------------------------------------------------------------------


def test_the_first_device_there_is(gpus, monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda n, device: ones(n, device=other_device(device)))
    assert devices.chosen_device(None) == "cuda"
    assert devices.chosen_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.chosen_device(None) == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.chosen_device(None) == "cpu"


def test_what_a_device_computes_in_by_itself(gpus):
    """A T4 or V100 has bf16 only emulated, at a fraction of the speed."""
    assert devices.default_dtype("cuda:1") == ("bfloat16", None)
    gpus.has_bfloat16 = False
    assert devices.default_dtype("cuda") == ("float16", None)
    assert devices.default_dtype("mps") == ("float16", None)


@pytest.mark.parametrize("gain, dtype", [(0.01, "float32"), (1.1, "float32"), (2.5, "bfloat16")])
def test_a_cpu_computes_in_what_it_is_faster_in(monkeypatch, gain, dtype):
    monkeypatch.setattr(devices, "bfloat16_gain", lambda: gain)
    line = f"{dtype}: this CPU multiplies {gain} times as fast in bfloat16 as in float32"
    assert devices.default_dtype("cpu") == (dtype, f"{line} (--dtype chooses)")


@pytest.mark.parametrize("device, is_captured", [("cuda:1", True), ("cpu", False)])
def test_a_model_on_a_gpu_captures_its_steps(monkeypatch, device, is_captured):
    captured = []
    config = make_qilin().config
    checkpoint = SimpleNamespace(config=config, sources=[], is_fresh=False)
    monkeypatch.setattr(load, "read_checkpoint", lambda *_, **__: checkpoint)
    monkeypatch.setattr(load, "load_weights", lambda *_: None)
    monkeypatch.setattr(load, "capture_decoding", captured.append)
    model = load.load_qilin("a folder", device=device)
    assert captured == ([model] if is_captured else [])


def test_which_kernels_for_low_bits_may_take_what(monkeypatch):
    """On a GPU no activation is rounded that was not before, and the 4-bit kernel is its alone; on
    a CPU nothing is measured."""
    int8 = lowbit.QuantizedLinear(128, 64, bits=8)
    int4 = lowbit.QuantizedLinear(128, 64, bits=4)
    row = torch.zeros(1, 128)
    assert lowbit.can_multiply_int8(int8, row)
    assert not lowbit.can_multiply_tiles(int4, row.bfloat16())
    assert not lowbit.can_compile(int8, row)
    model = make_qilin()
    lowbit.quantize_linears(model, bits=8)
    assert lowbit.choose_ways(model) is None

    monkeypatch.setattr(lowbit, "is_on_gpu", lambda tensor: True)
    for may_take, layer in ((lowbit.can_multiply_int8, int8), (lowbit.can_multiply_tiles, int4)):
        assert may_take(layer, row.bfloat16())
        assert not may_take(layer, row)
    assert lowbit.can_compile(int8, row)
    assert not lowbit.can_compile(int8, row.expand(2, 128))


def test_a_kernel_is_timed_on_weights_that_are_not_in_the_cache(monkeypatch):
    """The cache is overwritten before each call, outside what is timed, and times are read when
    the GPU is done; of 10 the median."""
    told = []
    milliseconds = iter([9, 1, 5, 4, 6, 3, 7, 8, 2, 10])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("event")

        def elapsed_time(self, end):
            assert "done" in told
            return next(milliseconds)

    def empty(n, dtype, device):
        assert n * dtype.itemsize >= 50 * 2**20 and device == GPU
        return SimpleNamespace(zero_=lambda: told.append("overwritten"))

    @contextmanager
    def current(device):
        told.append(f"on {device}")
        yield
        told.append("left")

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("done"))
    seconds = lowbit_kernels.gpu_seconds(lambda: told.append("call"), GPU)
    assert seconds == pytest.approx(0.006)
    timed = 10 * ["overwritten", "event", "call", "event"]
    assert told == ["call", "on cuda:3", *timed, "done", "left"]


def test_a_system_out_of_memory_leaves_the_gpu_to_the_next(gpus, monkeypatch):
    """Its reason stands in place of its answers, and the memory goes back."""

    def ask(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(systems, "ask_folder", ask)
    system: Any = SimpleNamespace(name="large", endpoint=None, folder="large", where="large")
    todo: dict[str, Any] = {"7": None}
    finished: Any = {}
    how: Any = None
    answers = systems.ask_system(system, todo, 0, how, finished)
    assert "out of memory" in answers["7"]
    assert gpus.told == [("empty_cache",)]


# --- train.py --smoke -----------------------------------------------------------------------------


@pytest.fixture
def smoke(gpus, monkeypatch, tmp_path):
    """training/smoke.py, imported where there are GPUs."""
    spec = importlib.util.spec_from_file_location("smoke_on_gpus", ROOT / "training/smoke.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "smoke_on_gpus", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TOY", tmp_path / "toy")
    monkeypatch.setattr(module, "OUT", tmp_path)
    monkeypatch.setattr(module, "WEIGHTS", tmp_path / "weights")
    return module


def test_smoke_uses_all_gpus(smoke):
    """A billion parameters where they fit: half of all memory for 16 bytes a parameter."""
    assert (smoke.IS_CUDA, smoke.RANKS, smoke.BATCH) == (True, 8, 128)
    smoke.shutil = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=10**12))
    assert smoke.n_blocks_to_write() == 20
    smoke.torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=GIB)
    # 8 GiB / 2 / (16 x 50.6 M)
    assert smoke.n_blocks_to_write() == 5


def test_smoke_makes_its_weights_on_a_gpu(smoke, monkeypatch):
    """And of them knows that they are computed in bf16."""
    made = []

    def save(folder, text, tower, seed):
        with FakeTensorMode():
            made.append((torch.empty(1).device.type, tower))

    monkeypatch.setattr(toy, "save_random_weights", save)
    (smoke.TOY / "llama").mkdir(parents=True)
    (smoke.TOY / "llama/tokenizer.model").write_bytes(b"")
    smoke.write_weights()
    assert made == [("cuda", plan.PAPER_TOWER)]

    launched = []

    def launch(name, *words, **how):
        launched.append(name)
        return SimpleNamespace(finish=lambda: "")

    checks = smoke.Checks()
    checks.launch = launch
    config = make_qilin().config
    monkeypatch.setattr(smoke, "read_checkpoint", lambda **_: SimpleNamespace(config=config))
    checks.world()
    assert launched == ["toy", "weights"]
    assert checks.sizes.e == 2


def test_a_rank_of_smoke_takes_its_gpu_before_it_joins(smoke, gpus, monkeypatch):
    class Joined(Exception):
        pass

    def join(backend):
        gpus.told.append(("join", backend))
        raise Joined

    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(Joined):
        smoke.rank_check()
    assert gpus.told == [("set_device", GPU), ("join", "nccl")]


def test_smoke_says_on_what_it_ran_and_what_is_proven(smoke, capsys, monkeypatch):
    """All rows count there, those too that a CPU cannot pass."""
    rows = [smoke.SmokeRow("row", lambda checks: "figures", is_cuda_only=True)]
    monkeypatch.setattr(smoke, "TABLE", rows)
    monkeypatch.setattr(smoke.signal, "signal", lambda *_: None)
    smoke.run_smoke()
    said = capsys.readouterr().out
    assert "8 processes on NVIDIA A100-SXM4-80GB, 80 GiB" in said
    assert "1 passed, 0 failed, 0 skipped" in said

    def skip(checks):
        raise smoke.Skipped("why")

    row = smoke.SmokeRow("row", skip)
    assert smoke.run_check(smoke.Checks(), row, {}) == ("skipped", "why")


def test_smoke_holds_the_gpus_peak_to_the_plans(smoke, monkeypatch):
    """Within 15 %; on a CPU the whole process is counted, and nothing held."""
    checks = smoke.Checks()
    checks.sizes = count_sizes(make_qilin().config, ("mm_projector", "llm"))
    row = {"conversations": []}
    monkeypatch.setattr(smoke, "Tokenizer", lambda folder: None)
    monkeypatch.setattr(smoke, "read_json", lambda path: [row] * smoke.BATCH)
    monkeypatch.setattr(smoke, "encode_conversation", lambda *_: ([1] * 100_000, []))

    def figures(peak):
        monkeypatch.setattr(smoke, "logged", lambda run: [{"memory_gib": peak}])
        return checks.memory()

    with pytest.raises(smoke.Failed) as failed:
        figures(0.0)
    planned = float(re.search(r"plan ([\d.]+)", str(failed.value))[1])
    assert planned > 1
    assert "of the whole process" not in figures(1.1 * planned)
    for share in (0.8, 1.2):
        with pytest.raises(smoke.Failed):
            figures(share * planned)


def test_smoke_asks_of_a_resumed_run_what_gpus_can_hold(smoke, monkeypatch):
    """Losses within 1e-2, not weights byte for byte: sums are taken in no fixed order."""
    checks = smoke.Checks()
    text = "going on after step 4"
    checks.train = lambda *_: SimpleNamespace(finish=lambda: text)

    def figures(gap):
        (smoke.OUT / "killed").mkdir(exist_ok=True)
        losses = {"killed": 2.0 + gap, "stage2": 2.0}
        monkeypatch.setattr(smoke, "logged", lambda run: [{"loss": losses[run]}])
        return checks.resume()

    assert "5.0e-03" in figures(0.005)
    with pytest.raises(smoke.Failed):
        figures(0.02)
