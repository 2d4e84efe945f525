"""Endpoints that the tests of the API share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def native() -> Iterator:
    """The endpoint over tiny random models: sft (chat), pretrain (base), calc (always calls its calculator)."""
    from api_backends import engine_backend
    from api_server import serving

    backend = engine_backend()
    with serving(backend, max_messages=50, max_n=4, max_body_bytes=1 << 18, event_interval_s=0.001) as server:
        yield server
    backend.close()


@pytest.fixture(scope="session")
def scripted_server() -> Iterator:
    from api_backends import ScriptedBackend
    from api_server import serving

    with serving(ScriptedBackend(), max_waiting=4) as server:
        yield server


@pytest.fixture
def scripted(scripted_server):
    """The endpoint over a backend that follows a script, with nothing left of the test before."""
    scripted_server.backend.reset()
    return scripted_server
