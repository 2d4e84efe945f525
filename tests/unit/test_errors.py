"""The tree of errors: drawn as it is, survives pickling, and each class is raised somewhere."""

import inspect
import pickle
import re
from pathlib import Path

import pytest

import nanochat
from nanochat import errors

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_pickling_with_its_message(cls):
    message = "depth=0: must be at least 1. Leave it out for the default."
    copy = pickle.loads(pickle.dumps(cls(message)))
    assert type(copy) is cls
    assert str(copy) == message
    assert copy.args == (message,)


HOSTILE = "a\x1b[2J\x07b\u202ec\n\u00e9 \ud800" + "x" * 50_000


def test_what_comes_from_outside_is_one_short_printable_line():
    shown = errors.excerpt(HOSTILE)
    assert shown.startswith(r"a\x1b[2J\x07b\u202ec \xe9 \ud800xxx".replace(r"\xe9", "\u00e9"))
    assert shown.endswith("x...")
    assert len(shown) == errors.EXCERPT_CHARS
    assert shown.isprintable()
    assert len(errors.excerpt("\x1b" * 50_000)) == errors.EXCERPT_CHARS
    assert errors.excerpt(ValueError("two\n  lines")) == "two lines"
    assert errors.excerpt("x" * errors.EXCERPT_CHARS) == "x" * errors.EXCERPT_CHARS


@pytest.mark.parametrize("cls", CLASSES)
def test_no_message_steers_a_terminal(cls):
    error = cls("path=/tmp/\x1b]0;title\x07\nna\u00efve.parquet: is damaged.")
    assert str(error) == "path=/tmp/\\x1b]0;title\\x07\\nna\u00efve.parquet: is damaged."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_in_the_drawing_and_is_a_nanochat_error(cls):
    assert issubclass(cls, errors.NanochatError)
    assert inspect.getdoc(cls)
    assert re.search(rf"^ *{cls.__name__}\b", errors.__doc__ or "", re.MULTILINE)


def test_a_config_error_is_a_value_error_for_the_command_line():
    assert issubclass(errors.ConfigError, ValueError)
    others = set(CLASSES) - {errors.ConfigError, errors.DamagedFileError}
    assert not any(issubclass(cls, ValueError) for cls in others)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not errors.NanochatError])
def test_every_error_is_raised_somewhere(cls):
    root = Path(nanochat.__file__).parent
    sources = [path.read_text() for path in root.rglob("*.py") if path.name != "errors.py"]
    made = re.compile(rf"\b{cls.__name__}\(")
    assert any(made.search(source) for source in sources)
