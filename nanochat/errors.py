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
"""

EXCERPT_CHARS = 200


def excerpt(content: object) -> str:
    """Return what came from outside for a message: one line of at most EXCERPT_CHARS, escaped where not printable."""
    line = escaped(" ".join(str(content)[: 10 * EXCERPT_CHARS].split())[: EXCERPT_CHARS + 1])
    return line if len(line) <= EXCERPT_CHARS else line[: EXCERPT_CHARS - 3] + "..."


def escaped(text: str) -> str:
    """Return a text with escapes for all that could steer a terminal: control and format characters, line ends."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class NanochatError(Exception):
    """An error whose message says all that a user needs; shown without a traceback."""

    def __init__(self, message: str) -> None:
        """Keep the message escaped: paths and addresses stand in it as they are."""
        super().__init__(escaped(message))


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
