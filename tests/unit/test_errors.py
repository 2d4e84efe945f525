"""The tree of errors: drawn as it is, survives pickling, and each class is raised somewhere."""

import inspect
import pickle
import re
import time
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


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:Secret@example.org/x", "https://***@example.org/x"),
        ("https://Secret@example.org/x@1", "https://***@example.org/x@1"),
        ("https://me:Sec@ret@example.org/x", "https://***@example.org/x"),
        ("s3://KEY:Sec/ret+1@bucket/x", "s3://***@bucket/x"),
        ("simplecache::https://me:Secret@example.org/x", "simplecache::https://***@example.org/x"),
        ("('corpus=s3://KEY:Secret@bucket/x', 'y')", "('corpus=s3://***@bucket/x', 'y')"),
    ],
)
def test_passwords_in_addresses_are_shown_to_nobody(address, shown):
    assert errors.without_credentials(address) == shown
    assert str(errors.DataError(f"url={address}: is down.")) == f"url={shown}: is down."
    assert errors.excerpt(address) == shown
    padding = "x" * (errors.EXCERPT_CHARS - len(address) + 8)
    assert "Sec" not in errors.excerpt(padding + address), "nor half of it, where the excerpt ends"
    with pytest.raises(errors.ConfigError, match=r"^mirror=.*\*\*\*@.*: an address must not hold"):
        errors.refuse_credentials(folder="runs/a", mirror=address)


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/a@b", "http://localhost:9000/data/a@1.parquet", "abfs://container@account/x", "runs/a:b@c",
        "hf://datasets/user/repo@main/x", "github://org:repo@main/x", "ftp://me@example.org/x",
        "s3://bucket/a:b@c", "mail me@example.org: now", "http://[::1]:80/a", "",
    ],
)  # fmt: skip
def test_addresses_without_passwords_stay_as_they_are(address):
    assert errors.without_credentials(address) == address
    errors.refuse_credentials(address=address)


@pytest.mark.parametrize(
    "repeated", ["a://", "a://b:", "http://", "http://a:", "a:1", "a:1/?#", "a'", "1", "a@", "@://a:"]
)
@pytest.mark.parametrize(
    "around", ["{}", "s3://{}", "http://{}", "s3://a:{}'@", "@{}://a:", "s3://a:{} ", "s3://a:1{}"]
)
def test_a_long_text_takes_no_long_time(repeated, around):
    start_s = time.process_time()
    errors.without_credentials(around.format(repeated * (80_000 // len(repeated))))
    assert time.process_time() - start_s < 1, "0.05 s is usual"
