"""What a person sees: live lines, finished lines, short endings of failed jobs, and two Ctrl-C."""

import io
import os
import pickle
import signal
import traceback

import pytest

from nanochat.cluster import terminal
from nanochat.cluster.terminal import ERROR_LINES, Terminal, last_lines, on_interrupt, run_job, with_story
from nanochat.errors import ConfigError


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_live_line_replaces_the_last_and_a_line_stays():
    screen = _Screen()
    shown = Terminal(screen)
    shown.line("begin")
    shown.live("step 1")
    shown.live("step 2")
    shown.line("end")
    shown.line("more")
    assert screen.getvalue() == "begin\n\r\x1b[2Kstep 1\r\x1b[2Kstep 2\nend\nmore\n"


def test_in_a_file_live_lines_come_every_ten_seconds_and_without_escapes(monkeypatch):
    now_s = 1000.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now_s)
    stream = io.StringIO()
    shown = Terminal(stream)
    for now_s in (1000.0, 1003.0, 1009.9, 1010.0, 1015.0, 1021.0):
        shown.live(f"at {now_s:g}")
    shown.line("end")
    assert stream.getvalue() == "at 1000\nat 1010\nat 1021\nend\n"


def test_a_job_that_ends_well_says_nothing(capsys):
    assert run_job(lambda: None, "run") == 0
    assert capsys.readouterr() == ("", "")


def test_a_users_error_is_one_line_without_a_traceback(capsys):
    def main() -> None:
        raise ConfigError("depth=0: must be at least 1. Leave it out for the default.")

    assert run_job(main, "run") == 2
    assert capsys.readouterr().err == "\nConfigError: depth=0: must be at least 1. Leave it out for the default.\n"


def test_ctrl_c_ends_a_job_quietly(capsys):
    def main() -> None:
        raise KeyboardInterrupt

    assert run_job(main, "run") == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def deep(levels: int) -> None:
    if levels == 0:
        raise RuntimeError("the cause\nin two lines")
    deep(levels - 1)


@pytest.mark.parametrize("levels", [0, 2, 300])
def test_an_unforeseen_error_ends_in_its_own_exception_file_line_and_log(capsys, tmp_path, levels):
    log = tmp_path / "ray.log"
    log.touch()
    assert run_job(lambda: deep(levels), str(tmp_path)) == 1
    lines = capsys.readouterr().err.strip("\n").split("\n")
    assert len(lines) <= ERROR_LINES + 1
    assert lines[-1] == f"Ray's log: {log}"
    assert lines[-3:-1] == ["RuntimeError: the cause", "in two lines"]
    assert any("test_terminal.py" in line and "line" in line for line in lines)


def test_an_error_of_another_process_still_names_its_file_and_line(capsys):
    """Pickling drops the traceback; the story noted before goes along."""
    try:
        deep(300)
    except RuntimeError as err:
        received = pickle.loads(pickle.dumps(with_story(err, "in worker 1", traceback.format_exc(), "errors/1.txt")))

    def main() -> None:
        raise received

    assert run_job(main, "absent") == 1
    lines = capsys.readouterr().err.strip("\n").split("\n")
    assert len(lines) <= ERROR_LINES + 1
    assert lines[:2] == ["RuntimeError: the cause", "in two lines"]
    assert "in worker 1:" in lines
    assert any('test_terminal.py", line' in line and "in deep" in line for line in lines)
    assert lines[-1] == "the whole story: errors/1.txt", "without a Ray there is no log of it"


def test_a_long_traceback_keeps_its_head_and_its_end():
    try:
        raise ValueError("\n".join(map(str, range(50))))
    except ValueError as err:
        lines = last_lines(err)
    assert len(lines) == ERROR_LINES
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == "  ..."
    assert lines[-1] == "49"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number):
    asked = []
    before = signal.getsignal(number)
    with on_interrupt(lambda: asked.append(1)):
        os.kill(os.getpid(), number)
        assert asked == [1]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert asked == [1]
    assert signal.getsignal(number) is before
