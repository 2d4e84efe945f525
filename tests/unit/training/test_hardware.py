"""Device, dtype and threads are chosen per run, and what the hardware lacks is refused."""

import pytest
import torch

from nanochat.config.pretrain import PretrainConfig
from nanochat.errors import ConfigError
from nanochat.training import hardware
from nanochat.training.hardware import Hardware, can_compile, choose_hardware, describe_machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    """A machine of four physical cores without a GPU; the thread count is recorded, not set."""
    threads: list[int] = []
    monkeypatch.setattr(hardware.psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return threads


@pytest.mark.parametrize(("workers", "expected"), [(1, 4), (2, 2), (3, 1), (4, 1), (9, 1)])
def test_workers_share_the_physical_cores(four_cores, workers, expected):
    assert choose_hardware(PretrainConfig(), 0, workers).device == CPU
    assert four_cores == [expected]


@pytest.mark.parametrize("able", ["avx512_bf16", "amx_bf16", "bf16", None])
def test_bfloat16_where_the_processor_multiplies_it(monkeypatch, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True} if able else {"avx512_bf16": False})
    chosen = choose_hardware(PretrainConfig(), 0, 1)
    assert chosen.dtype == (torch.bfloat16 if able else torch.float32)
    assert chosen.reason


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_dtype_that_is_asked_for_is_taken(dtype):
    chosen = choose_hardware(PretrainConfig(dtype=dtype), 0, 1)
    assert chosen.dtype == getattr(torch, dtype)
    assert chosen.reason == "asked for"


def test_fp8_is_refused_where_it_cannot_be():
    with pytest.raises(ConfigError, match=r"fp8=True: needs an NVIDIA Hopper GPU or newer. Leave it out"):
        choose_hardware(PretrainConfig(fp8=True), 0, 1)


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
    described = describe_machine(Hardware(CPU, torch.bfloat16, ""))
    assert described["dtype"] == "bfloat16"
    assert described["cores"] == 4
    assert described["gpus"] == 0
    assert described["memory_bytes"] > 10**8
    assert described["device"]


def test_memory_is_counted_in_bytes():
    here = Hardware(CPU, torch.float32, "")
    assert here.peak_flops is None
    assert here.free_bytes() > 10**7
    before = here.peak_memory_bytes()
    assert before > 10**7
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert here.peak_memory_bytes() >= 300_000_000
