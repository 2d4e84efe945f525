"""What a person at the terminal sees of a job: one live line, finished lines, and the end of a failed one."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TextIO

from nanochat import storage
from nanochat.errors import NanochatError

PLAIN_INTERVAL_S = 10.0
ERROR_LINES = 16
STORY_LINES = 12


class Terminal:
    """Writes to a terminal, or plainly to a file or pipe: there, live lines come every ten seconds.

    By default to the process's own stderr, also while `sys.stderr` is redirected to Ray's log.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.__stderr__ or sys.stderr
        self._live = False
        self._shown_s = 0.0

    def live(self, line: str) -> None:
        """Show a line that the next one replaces."""
        now_s = time.monotonic()
        if self.stream.isatty():
            self.stream.write(f"\r\x1b[2K{line}")
            self._live = True
        elif now_s - self._shown_s >= PLAIN_INTERVAL_S:
            self.stream.write(f"{line}\n")
            self._shown_s = now_s
        self.stream.flush()

    def line(self, line: str) -> None:
        """Write a line that stays."""
        self.stream.write(("\n" if self._live else "") + f"{line}\n")
        self._live = False
        self.stream.flush()


def run_job(main: Callable[[], None], run_dir: str) -> int:
    """Run a job's main function and return its exit code; errors end in a few lines that name cause and log.

    0 = done, 1 = failed, 2 = the input or a flag is wrong, 130 = interrupted.
    """
    try:
        main()
    except NanochatError as err:
        sys.stderr.write(f"\n{type(err).__name__}: {err}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    except Exception as err:  # the process's edge: everything that nobody foresaw
        log_path = storage.RunFolder(run_dir).ray_log
        log = f"\nRay's log: {log_path}" if os.path.exists(log_path) else ""
        sys.stderr.write("\n" + "\n".join(last_lines(err)) + f"{log}\n")
        return 1
    return 0


def last_lines(err: BaseException) -> list[str]:
    """Return the end of an exception's own traceback, short enough for one screen.

    An exception from another process has lost its traceback and carries it as a note, see `with_story`.
    """
    if getattr(err, "__notes__", None):
        lines = "".join(traceback.format_exception_only(err)).rstrip().split("\n")
    else:
        lines = "".join(traceback.format_exception(err, chain=False)).rstrip().split("\n")
    return lines if len(lines) <= ERROR_LINES else [lines[0], "  ...", *lines[-(ERROR_LINES - 2) :]]


def with_story(err: BaseException, where: str, story: str, path: str | None = None) -> BaseException:
    """Note on an exception, before it leaves its process, where it was raised: the end of `story`, its traceback."""
    frames = [line for line in story.rstrip().split("\n") if line.startswith(" ")]
    lines = [f"{where}:", *frames[-STORY_LINES:]]
    err.add_note("\n".join(lines if path is None else [*lines, f"the whole story: {path}"]))
    return err


@contextlib.contextmanager
def on_interrupt(ask_to_stop: Callable[[], None]) -> Iterator[None]:
    """Within the block the first Ctrl-C asks for a clean stop; the second raises KeyboardInterrupt."""
    asked = False

    def interrupt(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        ask_to_stop()

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
