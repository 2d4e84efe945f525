"""Queries of sequences that decode to what they see of their pages: one kernel for CPUs, built where a compiler is.

Products of torch need keys and values in one piece, which takes longer than the products; and each of a layer's dozen
operations has a fixed cost. `paged_attention.cpp` reads the pages where they lie. It is built for one type and head
size when they are first asked for (half a second, in each process), without torch's headers, and called by ctypes.
Each sequence is computed alone, so its company changes nothing.

Shapes: B sequences, H heads, G KV heads, D head size; P pages of S tokens.
Source of the idea: PagedAttention, Kwon et al. 2023 (arXiv 2309.06180), section 5.1.
Not covered: GPUs, more than one new token, head sizes that are no multiple of 16: these go by torch's products.
"""

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from nanochat.errors import excerpt

LANES = 16
ELEMENTS = {torch.float32: "float", torch.bfloat16: "bfloat16"}
BUILD_TIMEOUT_S = 60
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
NATIVE = {"arm64": "-mcpu=native", "aarch64": "-mcpu=native"}
log = logging.getLogger(__name__)


class DecodingAttention:
    """The kernel of one head size and type."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(
        self, q_BHD: Tensor, k_BGD: Tensor, v_BGD: Tensor, k_GPSD: Tensor, v_GPSD: Tensor, first_B: Tensor,
        table_P: Tensor, place_B: Tensor, window: int,
    ) -> Tensor:  # fmt: skip
        """Put the new keys and values into their pages, and return what each query sees, y_BHD.

        A sequence's new token is at `place_B`; its row of `table_P`, flat, B rows of like length, has its pages from
        number `first_B` on. The query sees `window` tokens before its own.
        """
        q_BHD, k_BGD, v_BGD = (_in_rows(one) for one in (q_BHD, k_BGD, v_BGD))
        B, H, D = q_BHD.shape
        G, P = k_GPSD.shape[:2]
        y_BHD = q_BHD.new_empty(B, H, D)
        self._function(
            q_BHD.data_ptr(), k_BGD.data_ptr(), v_BGD.data_ptr(), k_GPSD.data_ptr(), v_GPSD.data_ptr(),
            table_P.data_ptr(), first_B.data_ptr(), place_B.data_ptr(), y_BHD.data_ptr(), B, H, G, P,
            len(table_P) // B, window, q_BHD.stride(0), k_BGD.stride(0), v_BGD.stride(0), D**-0.5,
            torch.get_num_threads(),
        )  # fmt: skip
        return y_BHD


def _in_rows(x_BHD: Tensor) -> Tensor:
    """Return a tensor whose heads and channels lie in one piece."""
    return x_BHD if x_BHD.stride()[1:] == (x_BHD.shape[2], 1) else x_BHD.contiguous()


@functools.cache
def decoding_attention(head_dim: int, page_tokens: int, dtype: torch.dtype) -> DecodingAttention | None:
    """Return the kernel; None where there is no compiler, or no kernel for such heads."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or head_dim % LANES or dtype not in ELEMENTS:
        return None
    source = resources.files("nanochat.inference").joinpath("paged_attention.cpp").read_bytes()
    sizes = (f"-DHEAD_SIZE={head_dim}", f"-DPAGE_TOKENS={page_tokens}", f"-DELEMENT={ELEMENTS[dtype]}")
    native = NATIVE.get(os.uname().machine, "-march=native")
    with tempfile.TemporaryDirectory(prefix="nanochat-kernel-") as folder:
        path = Path(folder, "kernel.so")
        command = [compiler, *FLAGS, native, *sizes, "-x", "c++", "-", "-o", str(path)]
        story = ""
        for threads in (["-fopenmp"], []):
            try:
                done = subprocess.run([*command, *threads], input=source, capture_output=True, timeout=BUILD_TIMEOUT_S)
                story = done.stderr.decode("utf-8", "replace")
                function = ctypes.CDLL(str(path)).decode
            except (OSError, AttributeError, subprocess.TimeoutExpired) as err:
                story += str(err)
                continue
            function.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 9 + [ctypes.c_float, ctypes.c_int]
            function.restype = None
            return DecodingAttention(function)
    log.warning("attention by torch's products: %s built no kernel (%s)", compiler, excerpt(story))
    return None
