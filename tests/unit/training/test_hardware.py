"""Device, dtype and threads are chosen per run, and what the hardware lacks is refused."""

import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from nanochat.config.pretrain import PretrainConfig
from nanochat.errors import ConfigError
from nanochat.run_context import RunContext
from nanochat.training import hardware
from nanochat.training.hardware import Hardware, can_compile, choose_hardware, describe_machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    """A machine of four physical cores without a GPU; the thread count is recorded, not set."""
    threads: list[int] = []
    monkeypatch.setattr(hardware.psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return threads


@pytest.mark.parametrize(("workers", "expected"), [(1, 4), (2, 2), (3, 1), (4, 1), (9, 1)])
def test_workers_share_the_physical_cores(four_cores, workers, expected):
    assert choose_hardware(PretrainConfig(), RunContext(local_world_size=workers)).device == CPU
    assert four_cores == [expected]


def test_cores_that_the_process_may_not_use_do_not_count(four_cores, monkeypatch):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: {5, 6, 7}, raising=False)
    choose_hardware(PretrainConfig(), RunContext())
    assert four_cores == [3]


@pytest.mark.parametrize("able", ["avx512_bf16", "amx_bf16", "bf16", None])
def test_bfloat16_where_the_processor_multiplies_it(monkeypatch, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True} if able else {"avx512_bf16": False})
    chosen = choose_hardware(PretrainConfig(), RunContext())
    assert chosen.dtype == (torch.bfloat16 if able else torch.float32)
    assert chosen.reason == f"the hardware {'multiplies' if able else 'does not multiply'} bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_dtype_that_is_asked_for_is_taken(dtype):
    chosen = choose_hardware(PretrainConfig(dtype=dtype), RunContext())
    assert chosen.dtype == getattr(torch, dtype)
    assert chosen.reason == "asked for"


def test_fp8_is_refused_where_it_cannot_be():
    with pytest.raises(ConfigError, match=r"fp8=True: needs an NVIDIA Hopper GPU or newer. Leave it out"):
        choose_hardware(PretrainConfig(fp8=True), RunContext())


def test_without_a_compiler_training_says_what_that_costs(monkeypatch):
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in str(can_compile(CPU))
    assert "Install g++" in str(can_compile(CPU))
    monkeypatch.setenv("CXX", "/opt/bin/c++")
    assert can_compile(CPU) is None
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert can_compile(CPU) is None


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("some new thing", None),
    ],
)
def test_peak_speed_goes_by_the_name(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert Hardware(torch.device("cuda", 0), torch.bfloat16, "").peak_flops == flops


def test_the_machine_is_described_for_readers_of_numbers():
    assert describe_machine(Hardware(CPU, torch.bfloat16, "")) == {
        "device": hardware.cpu_name(), "dtype": "bfloat16", "cores": 4, "gpus": 0,
        "memory_bytes": psutil.virtual_memory().total, "platform": platform.platform(),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
    if sys.platform == "linux" and platform.machine() == "x86_64":
        assert f"model name\t: {hardware.cpu_name()}\n" in Path("/proc/cpuinfo").read_text()


def test_memory_is_counted_in_bytes(monkeypatch):
    here = Hardware(CPU, torch.float32, "")
    assert here.peak_flops is None
    with monkeypatch.context() as patch:
        patch.setattr(hardware.psutil, "virtual_memory", lambda: SimpleNamespace(available=7, free=5, total=9))
        assert here.free_bytes() == 7
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    now = psutil.Process().memory_info().rss
    assert now >= 300_000_000
    assert 0.99 * now <= here.peak_memory_bytes() < psutil.virtual_memory().total
