import email.utils
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hostile_server import Fault, HostileServer

from nanochat import storage
from nanochat.data.download import BLOCK_BYTES, RetryPolicy, download
from nanochat.errors import ConfigError, DataError

CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(290_000)


@pytest.fixture
def server():
    with HostileServer({"shard": CONTENT}) as server:
        yield server


def fetch(server: HostileServer, path: Path, **options) -> list[float]:
    """Download with next to no waiting; return the pauses."""
    waits: list[float] = []
    retry = RetryPolicy(first_wait_s=0.001, attempts=5, timeout_s=2, sleep=waits.append)
    download(f"{server.url}/shard", str(path), retry=retry, **options)
    return waits


def leftovers(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir()} - {
        path.name,
        f"{path.name}.download.json",
        f"{path.name}.lock",
    }


@pytest.mark.parametrize("like_hugging_face", [False, True])
def test_fetches_and_reports_progress(server, tmp_path, like_hugging_face):
    server.like_hugging_face = like_hugging_face
    seen = []
    assert fetch(server, tmp_path / "new" / "x", progress=lambda done, total: seen.append((done, total))) == []
    assert (tmp_path / "new" / "x").read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)
    assert not leftovers(tmp_path / "new" / "x")


def test_a_verified_file_is_not_asked_for_again(server, tmp_path):
    fetch(server, tmp_path / "x")
    asked = len(server.requests)
    fetch(server, tmp_path / "x")
    assert len(server.requests) == asked
    (tmp_path / "x").write_bytes(CONTENT[:-1])
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_another_url_is_another_file(server, tmp_path):
    fetch(server, tmp_path / "x")
    server.files["other"] = CONTENT[::-1]
    download(f"{server.url}/other", str(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == CONTENT[::-1]


def test_the_environment_s_proxy_is_used(server, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    download("http://far.invalid/shard", str(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.requests[0].path == "http://far.invalid/shard"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fetch(server, tmp_path / "y")
    assert server.requests[1].path == "/shard"


def test_a_copied_file_is_adopted_only_if_the_checksum_fits(server, tmp_path):
    server.like_hugging_face = True
    (tmp_path / "x").write_bytes(CONTENT)
    inode = (tmp_path / "x").stat().st_ino
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").stat().st_ino == inode
    (tmp_path / "y").write_bytes(CONTENT[:-1] + b"?")
    fetch(server, tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == CONTENT


@pytest.mark.parametrize("seed", range(5))
def test_cut_connections_are_resumed_where_they_ended(server, tmp_path, seed):
    offsets = random.Random(seed).sample(range(1, 90_000), 4)
    server.script = [Fault(cut_after=offset) for offset in offsets]
    waits = fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert len(waits) == 4
    ends = [sum(offsets[:count]) for count in range(1, 5)]
    assert [request.range for request in server.requests] == [None, *(f"bytes={end}-" for end in ends)]
    assert [request.if_range for request in server.requests] == [None] + [f'"{hashlib.md5(CONTENT).hexdigest()}"'] * 4
    assert server.sent == len(CONTENT)


def test_waits_double_with_jitter_and_have_a_ceiling(server, tmp_path):
    server.script = [Fault(status=503)] * 7
    waits: list[float] = []
    retry = RetryPolicy(first_wait_s=1, longest_wait_s=10, sleep=waits.append)
    download(f"{server.url}/shard", str(tmp_path / "x"), retry=retry)
    for wait, least in zip(waits, [1, 2, 4, 5, 5, 5, 5], strict=True):
        assert least <= wait <= 2 * least
    assert len({wait / least for wait, least in zip(waits, [1, 2, 4, 5, 5, 5, 5])}) > 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_retry_after_is_honoured(server, tmp_path, status):
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    server.script = [Fault(status=status, retry_after=text) for text in ("17", date, "100000")] + [Fault(status=status)]
    waits = fetch(server, tmp_path / "x")
    assert waits[0] == 17
    assert 50 < waits[1] <= 60
    assert waits[2] == RetryPolicy().longest_retry_after_s
    assert waits[3] < 1
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_gives_up_with_url_reason_attempts_and_remedy(server, tmp_path):
    server.script = [Fault(status=500)] * 5
    with pytest.raises(DataError, match=rf"url={server.url}/shard: .*500.* after 5 attempts\. .*mirror"):
        fetch(server, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_came_before_giving_up_is_kept(server, tmp_path):
    server.script = [Fault(cut_after=10_000)] * 5
    with pytest.raises(DataError, match=r"IncompleteRead.*after 5 attempts.*from byte 50000"):
        fetch(server, tmp_path / "x")
    fetch(server, tmp_path / "x")
    assert server.sent == len(CONTENT)


def test_progress_counts_against_giving_up(tmp_path):
    content = random.Random(2).randbytes(9 * BLOCK_BYTES)
    with HostileServer({"shard": content}, script=[Fault(cut_after=BLOCK_BYTES)] * 8) as server:
        fetch(server, tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == content
        assert server.sent == len(content)


def test_a_server_that_always_flips_a_byte_is_given_up_on_however_much_it_sends(tmp_path):
    content = random.Random(2).randbytes(4 * BLOCK_BYTES)
    faults = [Fault(cut_after=2 * BLOCK_BYTES), Fault(flip_at=3 * BLOCK_BYTES)] * 20
    with HostileServer({"shard": content}, script=faults, like_hugging_face=True) as server:
        with pytest.raises(DataError, match="SHA-256"):
            fetch(server, tmp_path / "x")
        assert len(server.requests) < 12


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_answers_that_will_not_change_are_not_retried(server, tmp_path, status):
    server.script = [Fault(status=status)]
    with pytest.raises(DataError, match=str(status)):
        fetch(server, tmp_path / "x")
    assert len(server.requests) == 1


def test_a_flipped_byte_is_found_and_fetched_anew(server, tmp_path):
    server.like_hugging_face = True
    server.script = [Fault(flip_at=123_456)]
    assert len(fetch(server, tmp_path / "x")) == 1
    assert (tmp_path / "x").read_bytes() == CONTENT
    server.script = [Fault(flip_at=0)] * 5
    with pytest.raises(DataError, match=r"SHA-256 .* the server says"):
        fetch(server, tmp_path / "y")
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("like_hugging_face", [False, True])
@pytest.mark.parametrize("lie", [-1, -1000, 1, 1000])
def test_lies_about_the_length_are_found(server, tmp_path, lie, like_hugging_face):
    server.like_hugging_face = like_hugging_face
    server.script = [Fault(length_lie=lie)]
    assert fetch(server, tmp_path / "x", ends_with=CONTENT[-4:])
    assert (tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("lie", [-1, 1])
def test_a_server_that_goes_on_lying_is_given_up_on(server, tmp_path, lie):
    server.script = [Fault(length_lie=lie)] * 9
    with pytest.raises(DataError, match="after 5 attempts"):
        fetch(server, tmp_path / "x", ends_with=CONTENT[-4:])
    assert not (tmp_path / "x").exists()


def test_a_server_without_size_or_range_or_etag(server, tmp_path):
    server.sends_length = False
    with pytest.raises(DataError, match="size"):
        fetch(server, tmp_path / "x")
    server.like_hugging_face = True
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    server.sends_etag = False
    server.script = [Fault(cut_after=100_000)]
    before = server.sent
    fetch(server, tmp_path / "y")  # the checksum alone makes resuming safe
    assert server.sent - before == len(CONTENT)


def test_nothing_is_resumed_that_nothing_identifies(server, tmp_path):
    server.sends_etag = False
    server.script = [Fault(cut_after=100_000), Fault(change_to=OTHER)]
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == OTHER
    assert server.requests[1].range is None


def test_a_server_that_ignores_ranges(server, tmp_path):
    server.script = [Fault(cut_after=100_000), Fault(ignores_range=True)]
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.requests[1].range == "bytes=100000-"
    assert server.requests[1].status == 200


def test_a_server_that_answers_another_range(server, tmp_path):
    server.script = [Fault(cut_after=100_000), Fault(wrong_start=True)]
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("like_hugging_face", [False, True])
@pytest.mark.parametrize("honours_if_range", [True, False])
@pytest.mark.parametrize("other", [OTHER, CONTENT[::-1], CONTENT[:50_000]])
def test_a_file_that_changes_between_attempts_is_never_mixed(
    server, tmp_path, other, honours_if_range, like_hugging_face
):
    server.like_hugging_face = like_hugging_face
    server.honours_if_range = honours_if_range
    server.script = [Fault(cut_after=100_000), Fault(cut_after=10, change_to=other)]
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == other


def test_a_stalled_connection_is_cut_and_resumed(server, tmp_path):
    server.script = [Fault(pause_after=120_000)]
    retry = RetryPolicy(first_wait_s=0.001, timeout_s=0.2)
    download(f"{server.url}/shard", str(tmp_path / "x"), retry=retry)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.requests[1].range == "bytes=120000-"


def test_nobody_listens(tmp_path):
    with HostileServer() as server:
        url = server.url
    retry = RetryPolicy(first_wait_s=0.001, attempts=2)
    with pytest.raises(DataError, match="after 2 attempts"):
        download(f"{url}/shard", str(tmp_path / "x"), retry=retry)


CHILD = """
import sys
from nanochat.data.download import download
download(sys.argv[1], sys.argv[2])
"""


def test_a_killed_download_goes_on_in_the_next_process(server, tmp_path):
    path = tmp_path / "x"
    server.script = [Fault(pause_after=200_000)]
    child = subprocess.Popen([sys.executable, "-c", CHILD, f"{server.url}/shard", str(path)])
    try:
        deadline = time.monotonic() + 20
        partial = tmp_path / "x.partial"
        while not (partial.exists() and partial.stat().st_size > 100_000):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    had = partial.stat().st_size
    assert not path.exists()
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert server.requests[1].range == f"bytes={had}-"
    assert server.requests[1].status == 206
    assert server.sent < 2 * len(CONTENT)
    assert not leftovers(path)


def test_a_partial_file_without_its_record_is_not_trusted(server, tmp_path):
    (tmp_path / "x.partial").write_bytes(OTHER[:1000])
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    (tmp_path / "y.partial").write_bytes(OTHER[:1000])
    (tmp_path / "y.partial.json").write_text('{"url": ')
    fetch(server, tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == CONTENT


def test_two_at_once_fetch_once(server, tmp_path):
    server.script = [Fault(pause_after=50_000)]
    threads = [threading.Thread(target=fetch, args=(server, tmp_path / "x")) for _ in range(3)]
    for thread in threads:
        thread.start()
    server.go_on.set()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_full_disk_is_told_before_and_during(server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage, "free_bytes", lambda path: 1_000_000)
        with pytest.raises(DataError, match=r"0 MB to fetch and 1 MB free.*Free some space"):
            fetch(server, tmp_path / "x")
    assert not (tmp_path / "x.partial").exists()

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(DataError, match="disk is full"):
            fetch(server, tmp_path / "x")
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_record_names_what_was_verified(server, tmp_path):
    server.like_hugging_face = True
    fetch(server, tmp_path / "x")
    record = json.loads((tmp_path / "x.download.json").read_text())
    assert record["sha256"] == storage.sha256_file(str(tmp_path / "x"))
    assert (record["size"], record["url"]) == (len(CONTENT), f"{server.url}/shard")


def test_bad_targets_and_urls_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="local path"):
        download("http://127.0.0.1/x", "memory://x")
    with pytest.raises(ConfigError, match="http://"):
        download("ftp://127.0.0.1/x", str(tmp_path / "x"))
