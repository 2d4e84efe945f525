import pytest
from tiny_run import write_tiny_run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> str:
    """A finished run's directory; tests that change it copy it."""
    run_dir = str(tmp_path_factory.mktemp("runs") / "tiny")
    write_tiny_run(run_dir, tmp_path_factory.mktemp("text"))
    return run_dir
