"""Promise: a GPU that cannot be used is said, in torch's words, and never passed over in silence;
without any driver, or told to, the CPU is used."""

import os

import pytest
import torch
from conftest import ROOT, in_process

import train
from model_io import devices

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020).\nPlease update"
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"
GONE = "No CUDA GPUs are available"


@pytest.fixture
def broken(monkeypatch):
    """broken(text): torch built for GPUs, whose start fails with this text."""

    def make(text):
        def fail():
            raise RuntimeError(text)

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", fail)

    return make


@pytest.mark.parametrize("text", [TOO_OLD, NO_DRIVER, GONE])
@pytest.mark.parametrize("words", [("--smoke",), ("--stage", 1)])
def test_training_does_not_fall_back_to_the_cpu(broken, text, words):
    broken(text)
    done = in_process(train.main, *words, code=2)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and " ".join(text.split()) in lines[0] and "--device cpu" in lines[0]
    assert not done.stdout and not os.path.exists("out/smoke")


@pytest.mark.parametrize("rank, lines", [(8, 1), (9, 0)])
def test_a_host_without_a_usable_gpu_says_so_itself(broken, monkeypatch, rank, lines):
    """Two hosts of 8: the first rank of the second one has the word, the next one waits for it."""
    broken(TOO_OLD)
    monkeypatch.setattr(train.time, "sleep", lambda _: None)
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank - 8)}
    done = in_process(train.main, "--stage", 1, code=2, env=environment)
    assert len(done.stderr.splitlines()) == lines


@pytest.mark.parametrize(
    "words, environment",
    [
        (("--device", "cpu"), {}),
        ((), {"CUDA_VISIBLE_DEVICES": ""}),
        ((), {"CUDA_VISIBLE_DEVICES": "-1"}),
    ],
)
def test_training_on_the_cpu_is_told_so(broken, tmp_path, words, environment):
    """It goes on to the next thing that is wrong: the weights are not there."""
    broken(TOO_OLD)
    done = in_process(
        train.main, "--stage", 1, "--llm", tmp_path / "none", *words, code=2, env=environment
    )
    assert "driver" not in done.stderr and "none" in done.stderr


def test_device_cpu_hides_the_gpus_from_all_that_ask(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    devices.choose_training_device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_plan_needs_no_gpu(broken):
    broken(TOO_OLD)
    assert "plan of stage 1" in in_process(train.main, "--stage", 1, "--plan", code=0).stdout


def test_asking_uses_the_cpu_where_there_is_no_driver(broken):
    broken(NO_DRIVER)
    assert devices.chosen_device(None) == "cpu"


@pytest.mark.parametrize("text", [TOO_OLD, GONE])
def test_asking_stops_where_a_driver_cannot_be_used(broken, monkeypatch, text):
    broken(text)
    with pytest.raises(ValueError, match=r"--device cpu") as error:
        devices.chosen_device(None)
    assert text.split("\n")[0] in str(error.value)
    assert devices.chosen_device("cpu") == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.chosen_device(None) == "cpu"


@pytest.mark.parametrize("choose", [devices.choose_training_device, devices.chosen_device])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_device_cuda_says_why_there_is_none(choose):
    with pytest.raises(ValueError, match=r"--device cuda: .*(not compiled|NVIDIA|CUDA)"):
        choose("cuda")


@pytest.mark.parametrize("version, is_fine", [("2.10.1", False), ("2.11.0+cu130", True)])
def test_an_older_torch_is_refused(monkeypatch, version, is_fine):
    monkeypatch.setattr(torch, "__version__", version)
    if is_fine:
        devices.check_torch()
    else:
        with pytest.raises(ValueError, match=r"2\.10\.1 is too old: 2\.11 or newer"):
            devices.check_torch()


def test_the_oldest_torch_is_the_one_that_users_are_told():
    assert "2.11 or newer" in (ROOT / "requirements.txt").read_text()
    assert devices.OLDEST_TORCH == (2, 11)
