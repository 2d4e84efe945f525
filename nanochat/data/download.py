"""A URL to a verified local file, through servers that cut, stall, throttle and lie.

Bytes gather in `PATH.partial`, which outlives the process; `PATH.partial.json` says which version of the remote file
they belong to, and a later attempt asks for the rest only (Range, guarded by If-Range). The file takes its name once
its size and, where the server tells one, its SHA-256 are right; `PATH.download.json` then records that it was verified.
Hugging Face gives size and SHA-256 of large files as X-Linked-Size and X-Linked-ETag on the redirect to its storage.

Not covered: one file over several connections; servers that ask for credentials.
"""

import contextlib
import errno
import os
import random
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http import HTTPStatus
from urllib.parse import urljoin, urlsplit

import urllib3
from filelock import FileLock

from nanochat import storage
from nanochat.errors import ConfigError, DataError, excerpt

BLOCK_BYTES = 1 << 20
MAX_REDIRECTS = 8
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
SPARE_BYTES = 64 << 20  # left free on the disk, so that a download is not what fills it

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RetryPolicy:
    """How long a download keeps trying."""

    attempts: int = 8
    """Failures in a row, with less than BLOCK_BYTES gained by each, before it gives up."""
    first_wait_s: float = 1.0
    """Pause after the first failure; it doubles with each, and up to as much again is added at random."""
    longest_wait_s: float = 60.0
    """No pause of our own is longer."""
    longest_retry_after_s: float = 600.0
    """No pause that a server asks for is longer."""
    timeout_s: float = 30.0
    """Silence after which a connection counts as dead."""
    sleep: Callable[[float], None] = time.sleep
    """How a pause is spent."""


@dataclass(frozen=True)
class RemoteFile:
    """Which version of a remote file some bytes belong to."""

    url: str
    size: int
    sha256: str | None
    validator: str | None
    """Strong ETag or Last-Modified, which a server compares in If-Range."""

    def is_same(self, other: "RemoteFile") -> bool:
        """Tell whether bytes of one can be completed by bytes of the other."""
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return self.size == other.size and self.validator is not None and self.validator == other.validator


class _AttemptError(Exception):
    """What went wrong in an attempt that may go better next time."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason, retry_after_s)
        self.reason = reason
        self.retry_after_s = retry_after_s


def download(
    url: str,
    path: str,
    *,
    ends_with: bytes = b"",
    retry: RetryPolicy | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Fetch a file to a local path unless it is already there, verified.

    `ends_with`: bytes that a complete file ends in, for servers that tell no checksum. `progress` gets bytes had and in
    all. Of several processes that want the same path one downloads and the others wait for it.

    Raises: DataError naming URL, fault and attempts; ConfigError if the path is not local or the URL not http(s).
    """
    if not storage.is_local(path):
        raise ConfigError(f"path={path}: a download needs a local path. Download to local disk and upload from there.")
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"mirror={url}: must begin with http:// or https://. Give the folder of the shards there.")
    path = storage.filesystem(path)[1]
    storage.make_folder(os.path.dirname(path))
    with FileLock(path + ".lock"):
        transfer = _Transfer(url, path, ends_with, retry or RetryPolicy(), progress)
        if not transfer.is_done():
            transfer.run()


class _Transfer:
    """One file's download; holds the lock on its path."""

    def __init__(self, url: str, path: str, ends_with: bytes, retry: RetryPolicy, progress: Progress) -> None:
        self.url = url
        self.path = path
        self.ends_with = ends_with
        self.retry = retry
        self.progress = progress
        self.partial = path + ".partial"
        self.partial_record = path + ".partial.json"
        self.record = path + ".download.json"
        self.furthest = max(0, _local_size(self.partial))  # most bytes had so far, those since discarded included

    def is_done(self) -> bool:
        """Tell whether an earlier download of this URL is in place, by its record and size."""
        had = _read_record(self.record)
        return had is not None and had.url == self.url and _local_size(self.path) == had.size

    def run(self) -> None:
        """Attempt until the file is in place or too many attempts in a row have failed."""
        failures = 0
        while True:
            before = self.furthest
            try:
                with _connection_errors_as_attempts(), _pool(self.url, self.retry.timeout_s) as pool:
                    self._attempt(pool)
                return
            except _AttemptError as err:
                failures = 1 if self.furthest - before >= BLOCK_BYTES else failures + 1
                if failures >= self.retry.attempts:
                    raise DataError(
                        f"url={self.url}: {err.reason}; gave up after {failures} attempts. Check the network or set "
                        f"another mirror, then run it again: it goes on from byte {max(0, _local_size(self.partial))}."
                    ) from err
                self.retry.sleep(self._wait_s(failures, err.retry_after_s))
            except OSError as err:
                if err.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise DataError(f"path={self.path}: the disk is full. Free space there, then run it again.") from err

    def _attempt(self, pool: urllib3.PoolManager) -> None:
        had = _read_record(self.partial_record)
        offset = max(0, _local_size(self.partial)) if had and had.url == self.url else 0
        if had and offset == had.size:
            self._finish(had)
            return
        # without a validator a server cannot refuse to mix two versions, so only a checksum makes resuming safe
        resumes = had is not None and offset > 0 and bool(had.validator or had.sha256)
        headers = {"Accept-Encoding": "identity"}
        if had and resumes:
            headers["Range"] = f"bytes={offset}-"
            if had.validator:
                headers["If-Range"] = had.validator
        response, remote = self._open(pool, headers)
        try:
            if response.status == HTTPStatus.PARTIAL_CONTENT:
                if not (had and resumes and remote.is_same(had) and _range_start(response) == offset):
                    self._discard()
                    raise _AttemptError("the remote file changed while it was fetched")
            elif self._is_already_there(remote):
                return
            else:
                offset = 0
                self._discard()
                storage.write_json(self.partial_record, asdict(remote))
            self._need_space(remote.size - offset)
            self._receive(response, offset, remote.size)
        finally:
            response.close()
        self._finish(remote)

    def _open(self, pool: urllib3.PoolManager, headers: dict[str, str]) -> tuple[urllib3.BaseHTTPResponse, RemoteFile]:
        """Request the file, following redirects by hand: the checksum stands on the first answer."""
        url, linked_size, linked_sha256 = self.url, None, None
        for _ in range(MAX_REDIRECTS):
            response = pool.request("GET", url, headers=headers, preload_content=False, redirect=False, retries=False)
            linked_size = linked_size or _number(response.headers.get("X-Linked-Size"))
            linked_sha256 = linked_sha256 or _sha256(response.headers.get("X-Linked-ETag"))
            location = response.get_redirect_location()
            if not location:
                break
            response.close()
            url = urljoin(url, location)
        try:
            self._check_status(response)
            size = _announced_size(response)
            if size is None and linked_size is None:
                raise _AttemptError("the server does not tell the file's size")
        except BaseException:
            response.close()
            raise
        return response, RemoteFile(self.url, linked_size or size or 0, linked_sha256, _validator(response))

    def _check_status(self, response: urllib3.BaseHTTPResponse) -> None:
        status = response.status
        if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _AttemptError("the server sent a compressed body that was not asked for")
            return
        answer = f"the server answered {status} {excerpt(response.reason or '')}".rstrip()
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self._discard()  # more bytes here than there: a changed file, or a length that was a lie
            raise _AttemptError(answer + " to a request for the rest of the file")
        if status in RETRIED_STATUS:
            raise _AttemptError(answer, urllib3.Retry().get_retry_after(response))
        remedy = "Check the mirror and the file's name." if status == HTTPStatus.NOT_FOUND else "Try another mirror."
        raise DataError(f"url={self.url}: {answer}. {remedy}")

    def _receive(self, response: urllib3.BaseHTTPResponse, offset: int, size: int) -> None:
        with open(self.partial, "ab") as file:
            # read1 hands over what has come, so that a cut connection loses nothing
            while offset <= size and (block := response.read1(BLOCK_BYTES, decode_content=False)):
                file.write(block)
                offset += len(block)
                self.furthest = max(self.furthest, offset)
                self.progress(offset, size)
            file.flush()
            os.fsync(file.fileno())
        if offset > size:
            self._discard()
            raise _AttemptError(f"the server sent more than the {size} bytes that it announced")
        if offset < size:
            raise _AttemptError(f"the connection ended at {offset} of {size} bytes")

    def _finish(self, remote: RemoteFile) -> None:
        """Verify the complete bytes and give them their name."""
        size = _local_size(self.partial)
        problem = f"{size} bytes arrived where {remote.size} were announced" if size != remote.size else None
        if not problem and remote.sha256 and (found := storage.sha256_file(self.partial)) != remote.sha256:
            problem = f"the bytes have SHA-256 {found}, the server says {remote.sha256}"
        if not problem and not _ends_with(self.partial, self.ends_with):
            problem = f"the file is incomplete: it does not end in {self.ends_with!r}"
        if problem:
            self._discard()
            raise _AttemptError(problem)
        os.replace(self.partial, self.path)
        _sync_folder(os.path.dirname(self.path))
        storage.write_json(self.record, asdict(remote))
        storage.remove(self.partial_record)

    def _is_already_there(self, remote: RemoteFile) -> bool:
        """Adopt a file that came by another way (a copy, another mirror), if the server's checksum fits it."""
        if remote.sha256 is None or _local_size(self.path) != remote.size:
            return False
        if storage.sha256_file(self.path) != remote.sha256:
            return False
        storage.write_json(self.record, asdict(remote))
        self._discard()
        return True

    def _discard(self) -> None:
        """Drop what was fetched; bytes first, since bytes under a wrong record would be kept."""
        storage.remove(self.partial)
        storage.remove(self.partial_record)

    def _need_space(self, needed: int) -> None:
        free = storage.free_bytes(self.path)
        if free is not None and free < needed + SPARE_BYTES:
            raise DataError(
                f"path={self.path}: {needed / 1e6:.0f} MB to fetch and {free / 1e6:.0f} MB free on its disk. "
                "Free some space or choose another run_dir."
            )

    def _wait_s(self, failures: int, retry_after_s: float | None) -> float:
        own = min(self.retry.first_wait_s * 2 ** (failures - 1), self.retry.longest_wait_s / 2)
        own *= 1 + random.random()  # so that many workers do not come back at once
        return max(own, min(retry_after_s or 0.0, self.retry.longest_retry_after_s))


def _pool(url: str, timeout_s: float) -> urllib3.PoolManager:
    """Return a connection pool that uses the environment's proxy for a URL's host, as curl and pip do."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    timeout = urllib3.Timeout(connect=timeout_s, read=timeout_s)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        return urllib3.ProxyManager(proxy, timeout=timeout)
    return urllib3.PoolManager(timeout=timeout)


@contextlib.contextmanager
def _connection_errors_as_attempts() -> Iterator[None]:
    try:
        yield
    except urllib3.exceptions.HTTPError as err:
        raise _AttemptError(excerpt(f"{type(err).__name__}: {err}")) from err


def _announced_size(response: urllib3.BaseHTTPResponse) -> int | None:
    """Return the whole file's size as the answer's own headers have it."""
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        return _number(response.headers.get("Content-Range", "").rpartition("/")[2])
    return _number(response.headers.get("Content-Length"))


def _range_start(response: urllib3.BaseHTTPResponse) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _validator(response: urllib3.BaseHTTPResponse) -> str | None:
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _number(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"\d{1,18}", text) else None


def _sha256(etag: str | None) -> str | None:
    found = re.fullmatch(r'(?:W/)?"?([0-9a-fA-F]{64})"?', etag or "")
    return found[1].lower() if found else None


def _read_record(path: str) -> RemoteFile | None:
    """Return a record; none if it is missing or not ours, which only costs fetching again."""
    try:
        return RemoteFile(**storage.read_json(path))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _local_size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else -1


def _ends_with(path: str, tail: bytes) -> bool:
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - len(tail)))
        return file.read() == tail if tail else True


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
