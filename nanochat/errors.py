"""Every error that a user can cause, as one tree.

NanochatError
  ConfigError          a field's value breaks a rule (also a ValueError, so that the command line shows it as usage)
  DataError            text, shards or conversations that cannot be used
    AbsentFileError      a file that a split needs is not where it was looked for
    DamagedFileError     a file of a run directory that is cut short or changed (also a ValueError)
  TokenizerMismatchError  two artifacts were made with different tokenizers
  CheckpointError      a checkpoint or run directory that is missing, damaged or of another kind
  TrainingDivergedError   the loss became NaN or infinite
  ClusterError         Ray cannot give what was asked for, or a worker failed
  SandboxError         untrusted code cannot be confined here

Messages are one line: `field=value: the rule. The remedy.` What files and servers say goes into them by `excerpt`.
Users and passwords in addresses are masked in both.
"""

import re

EXCERPT_CHARS = 200
_HTTP = re.compile(r"(?:(?<=http://)|(?<=https://))[^/?#\s]*@")
"""All that stands before an @ at the start of an address over HTTP."""
_ELSEWHERE = re.compile(r"(?<=://)(?<!github://)[^/?#@]*:(?!\d+[/?#]).*@")
"""Elsewhere (abfs://container@account) only if it has a colon that no port follows; github://ORG:REPO@REF is another
thing. For words that end with an @: so it looks no further than to the next start, however hostile they are."""
_WORD = re.compile(r"""[^\s'"<>]+""")


def excerpt(content: object) -> str:
    """Return what came from outside for a message: one line of at most EXCERPT_CHARS, escaped where not printable."""
    start = without_credentials(str(content)[: 10 * EXCERPT_CHARS])
    line = escaped(" ".join(start.split())[: EXCERPT_CHARS + 1])
    return line if len(line) <= EXCERPT_CHARS else line[: EXCERPT_CHARS - 3] + "..."


def escaped(text: str) -> str:
    """Return a text with escapes for all that could steer a terminal: control and format characters, line ends."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def without_credentials(text: str) -> str:
    """Return a text whose addresses have lost the user and password before their host, in linear time."""
    return _WORD.sub(_without_password, _HTTP.sub("***@", text))


def _without_password(word: re.Match[str]) -> str:
    start, at, rest = word[0].rpartition("@")
    return _ELSEWHERE.sub("***@", start + at) + rest


def refuse_credentials(**fields: object) -> None:
    """Raise ConfigError if an address in a field holds a user or password: config.json and notes would keep them."""
    for field, value in fields.items():
        if without_credentials(text := str(value)) != text:
            raise ConfigError(
                f"{field}={text}: an address must not hold a user or password. Put them where the storage's own "
                "package looks for them: for s3:// the environment or ~/.aws."
            )


class NanochatError(Exception):
    """An error whose message says all that a user needs; shown without a traceback."""

    def __init__(self, message: str) -> None:
        """Keep the message escaped and without passwords: paths and addresses stand in it as they are."""
        super().__init__(escaped(without_credentials(message)))


class ConfigError(NanochatError, ValueError):
    """A configuration field has a value that breaks its rule."""


class DataError(NanochatError):
    """Input data that cannot be used; the message names the file and, where there is one, the row group."""


class AbsentFileError(DataError):
    """A file that is not where it was looked for."""


class DamagedFileError(DataError, ValueError):
    """A file of a run directory that is cut short or changed."""


class TokenizerMismatchError(NanochatError):
    """Artifacts that do not share one tokenizer."""


class CheckpointError(NanochatError):
    """A checkpoint or run directory that is missing, damaged or made for something else."""


class TrainingDivergedError(NanochatError):
    """The training loss became NaN or infinite."""


class ClusterError(NanochatError):
    """Ray cannot give the resources that were asked for, or a worker failed."""


class SandboxError(NanochatError):
    """Untrusted code cannot be confined here."""
