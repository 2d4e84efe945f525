"""What all tests share: hypothesis without deadlines, one torch thread, and the folder of real data."""

import os
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("nanochat", deadline=None)
hypothesis.settings.load_profile("nanochat")


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """Sums come out the same whatever the number of cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The processor, and the GPU where there is one."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data that NANOCHAT_TEST_DATA names."""
    folder = os.environ.get("NANOCHAT_TEST_DATA")
    if not folder:
        pytest.skip("NANOCHAT_TEST_DATA is not set")
    return Path(folder)
