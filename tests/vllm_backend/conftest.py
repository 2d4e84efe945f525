"""These tests need vLLM beside the project: `make test-vllm` runs them in an environment of its own."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path += [
    str(Path(__file__).parents[1] / folder) for folder in ("unit/model", "unit/inference", "e2e", "integration")
]


@pytest.fixture(scope="session", autouse=True)
def vllm() -> None:
    """Skip where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here: make test-vllm")
    from nanochat.inference.vllm_engine import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
