"""What this process computes on: device, dtype, threads, allocator, memory, peak speed. Asked per run, never early."""

import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from nanochat.config.training import LearnerConfig
from nanochat.errors import ConfigError
from nanochat.run_context import RunContext

PEAK_BF16_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "RTX 6000 Ada": 364e12,
}  # fmt: skip
"""Dense bf16 FLOP/s by a part of the device's name, the more special first. Source: NVIDIA data sheets."""

CPU_ALLOCATOR_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 35),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""glibc settings for a training process on CPU: keep freed activations instead of giving pages back and faulting them
in again at every step. A step of the depth-4 model takes 1.1 instead of 1.5 s (2 cores, AMD EPYC, 2026-11-22)."""

GPU_ENVIRONMENT = {
    "NCCL_DEBUG": "WARN",  # what is wrong between GPUs stands in the logs of Ray's workers
    "TORCH_FR_BUFFER_SIZE": "2000",  # a collective that times out leaves in /tmp which workers had come to it
}
"""Settings for a training process on a GPU, where the user has none; the rest NCCL and torch choose by themselves."""


@dataclass(frozen=True)
class Hardware:
    """The device that a worker computes on."""

    device: torch.device
    dtype: torch.dtype
    reason: str
    """Why this dtype."""

    @property
    def name(self) -> str:
        """The device's model name."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        if self.device.type == "mps":
            return "Apple GPU"
        return cpu_name()

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s by data sheet; None where unknown, as on CPUs."""
        if self.device.type != "cuda":
            return None
        return next((flops for part, flops in PEAK_BF16_FLOPS.items() if part in self.name), None)

    def free_bytes(self) -> int:
        """Return memory that is free; on CUDA also what torch has taken and does not use."""
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + unused
        return psutil.virtual_memory().available

    def total_bytes(self) -> int:
        """Return the device's memory."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[1]
        return psutil.virtual_memory().total

    def peak_memory_bytes(self) -> int:
        """Return the most memory used so far: of the allocator on CUDA, of the process elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def choose_hardware(config: LearnerConfig, run: RunContext) -> Hardware:
    """Pick device and dtype for a worker, and set its thread count.

    Raises: ConfigError if FP8 or a dtype is asked for that the hardware lacks.
    """
    if run.use_gpu and torch.cuda.is_available():
        device = torch.device("cuda", run.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    elif run.use_gpu and torch.backends.mps.is_available() and run.world_size == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, physical_cores() // run.local_world_size))
    if config.fp8 and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)):
        raise ConfigError("fp8=True: needs an NVIDIA Hopper GPU or newer. Leave it out: bfloat16 runs everywhere.")
    if config.dtype != "auto":
        return Hardware(device, getattr(torch, config.dtype), "asked for")
    if multiplies_bfloat16(device):
        return Hardware(device, torch.bfloat16, "the hardware multiplies bfloat16")
    return Hardware(device, torch.float32, "the hardware does not multiply bfloat16")


def physical_cores() -> int:
    """Return how many cores this process may use."""
    cores = psutil.cpu_count(logical=False) or 1
    return min(cores, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cores


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has bf16 matrix units (emulation does not count)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))
    return device.type == "mps"


def can_compile(device: torch.device) -> str | None:
    """Return why torch.compile cannot be used here, or None if it can."""
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++") or os.environ.get("CXX")):
        return "no C++ compiler: training runs uncompiled, about 2.5 times slower. Install g++ to compile"
    if device.type == "mps":
        return "torch.compile is not used on Apple GPUs"
    return None


def cpu_name() -> str:
    """Return the processor's model name."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_machine(hardware: Hardware) -> dict[str, Any]:
    """Return what a reader of numbers needs to know of the machine."""
    return {
        "device": hardware.name,
        "dtype": str(hardware.dtype).removeprefix("torch."),
        "cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": torch.cuda.device_count() if hardware.device.type == "cuda" else 0,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def matmul_gflops(dtype: torch.dtype, device: torch.device, repeats: int = 30) -> float:
    """Return the speed of an (8192 x 256) x (256 x 1024) product in GFLOP/s, the median of `repeats`."""
    a, b = torch.randn(8192, 256, device=device).to(dtype), torch.randn(256, 1024, device=device).to(dtype)
    times = []
    for _ in range(repeats + 5):
        start_s = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start_s)
    return 2 * 8192 * 256 * 1024 / sorted(times[5:])[repeats // 2] / 1e9
