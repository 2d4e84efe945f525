"""karpathy/nanochat's tokenizer.pkl to our tokenizer, without unpickling: nothing in the file can be called.

The file is tiktoken's Encoding as `pickle.dump` writes it. A pickle is a program for a stack machine; `pickletools`
takes it apart without running it, and here its few instructions that build dicts, strings, bytes and numbers are
followed, into plain values. Whatever else a pickle can say is refused by its name, calls of any kind among it: the one
object that such a file makes is never made here, its fields are only looked at. Then they must be what a tokenizer of
nanochat is made of: a split pattern that is known, our special tokens, byte tokens first, and merges in their order.

Sources: Python's Lib/pickletools.py, which says what each instruction does; tiktoken core.py, Encoding.__getstate__;
nanochat tokenizer.py@92d63d4, RustBPETokenizer.
Not covered: pickle protocols below 3, which nanochat does not write; tokenizers by the name of one of tiktoken's own.
"""

import pickletools
from dataclasses import dataclass
from typing import Any

from nanochat import storage
from nanochat.data.tokenizer import NUM_BYTES, SPECIAL_TOKENS, SPLIT_PATTERNS, Tokenizer
from nanochat.errors import DataError, excerpt

LARGEST_FILE_BYTES = 1 << 23
"""Half a million tokens; those of nanochat have 32,768 or 65,536, in less than a megabyte."""
LONGEST_TOKEN_BYTES = 1 << 10
MOST_ON_STACK = 1 << 12
"""pickle hands over the items of a dict in batches of a thousand keys and values."""
ADMITTED = ("tiktoken.core", "Encoding")
FIELDS = ("name", "pat_str", "mergeable_ranks", "special_tokens")

_LITERALS = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BININT", "BININT1", "BININT2"})
_KEEPS = frozenset({"MEMOIZE", "BINPUT", "LONG_BINPUT"})
_TAKES = frozenset({"BINGET", "LONG_BINGET"})
_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})


class _Mark:
    """Where the items of a dict begin on the stack."""


class _EncodingClass:
    """In place of tiktoken's class."""


@dataclass(frozen=True)
class _Encoding:
    """In place of the object: what it would be given as its state, None = nothing yet."""

    state: Any = None


_FRESH: dict[str, type[Any]] = {"EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "MARK": _Mark, "NEWOBJ": _Encoding}


def read_pickled_tokenizer(path: str) -> Tokenizer:
    """Return the tokenizer of nanochat's tokenizer.pkl; nothing of the file is run.

    Raises: DataError saying what in it is not as nanochat writes it.
    """
    if not storage.exists(path):
        raise DataError(f"tokenizer={path}: there is no such file. Name nanochat's tokenizer.pkl with --tokenizer.")
    if (size := storage.size_bytes(path)) > LARGEST_FILE_BYTES:
        raise DataError(f"tokenizer={path}: {size} bytes are too many, at most {LARGEST_FILE_BYTES}.")
    with storage.open_read(path) as file:
        content = file.read()
    try:
        return _tokenizer(_state(content))
    except (ValueError, LookupError) as err:
        why = err if isinstance(err, ValueError) else "has pickle instructions that do not fit together"
        raise DataError(
            f"tokenizer={path}: {excerpt(why)}. Nothing of it was run. Name nanochat's own tokenizer.pkl."
        ) from err


def _state(content: bytes) -> Any:
    """Return what a pickled Encoding would be given as its state. Raises: ValueError; LookupError as `follow`."""
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(content):
        machine.follow(opcode.name, argument)
        if len(machine.stack) > MOST_ON_STACK:
            raise ValueError(f"has more than {MOST_ON_STACK} values on its stack")
    if len(machine.stack) != 1 or not isinstance(machine.stack[0], _Encoding):
        raise ValueError("holds something else than one encoding")
    return machine.stack[0].state


class _Machine:
    """The part of pickle's stack machine that makes plain values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memo: list[Any] = []

    def follow(self, name: str, argument: Any) -> None:
        """Do an instruction. Raises: ValueError if it is not admitted; LookupError if the stack lacks what it needs."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _KEEPS:
            if argument not in (None, len(self._memo)):
                raise LookupError
            self._memo.append(stack[-1])
        elif name in _TAKES:
            stack.append(self._memo[argument])
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(len(stack) - 2 if name == "SETITEM" else self._items_begin())
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._admit(argument.split(" ", 1) if name == "GLOBAL" else [stack.pop(-2), stack.pop()])
        elif name == "BUILD":
            state = stack.pop()
            _need(stack.pop(), _Encoding)
            stack.append(_Encoding(state))
        elif name in _FRESH:
            if name == "NEWOBJ":
                _need(stack.pop(), tuple)
                _need(stack.pop(), _EncodingClass)
            stack.append(_FRESH[name]())
        elif name not in _IGNORED:
            raise ValueError(f"has the pickle instruction {name}, which no encoding needs")

    def _admit(self, asked: list[Any]) -> None:
        """Put the one class that is admitted on the stack, or rather what stands for it."""
        if tuple(asked) != ADMITTED:
            named = ".".join(part if isinstance(part, str) else type(part).__name__ for part in asked)
            raise ValueError(f"asks for {named}, and only {'.'.join(ADMITTED)} is admitted")
        self.stack.append(_EncodingClass())

    def _items_begin(self) -> int:
        """Return where the items after the last mark begin, and take the mark away; -1 without a mark."""
        marks = (place for place in reversed(range(len(self.stack))) if isinstance(self.stack[place], _Mark))
        if (place := next(marks, -1)) >= 0:
            del self.stack[place]
        return place

    def _set_items(self, begin: int) -> None:
        """Put keys and values from there on into the dict before them."""
        if begin < 1:
            raise LookupError
        target, items = _need(self.stack[begin - 1], dict), self.stack[begin:]
        del self.stack[begin:]
        for key, value in zip(items[0::2], items[1::2], strict=True):
            target[key if isinstance(key, str) else _need(key, bytes)] = value


def _need(value: Any, kind: type[Any]) -> Any:
    """Return a value of just this type. Raises: ValueError."""
    if type(value) is not kind:
        raise ValueError(f"has {type(value).__name__} where {kind.__name__} must be")
    return value


def _tokenizer(state: Any) -> Tokenizer:
    """Return the tokenizer that an encoding's state describes. Raises: ValueError saying what is not nanochat's."""
    if isinstance(state, str):
        raise ValueError(f"is tiktoken's own {excerpt(state)}, by name, which has not nanochat's special tokens")
    if set(_need(state, dict)) != set(FIELDS):
        raise ValueError(f"has the fields {excerpt(sorted(map(str, state)))}, not {', '.join(FIELDS)}")
    pattern = _need(state["pat_str"], str)
    if pattern not in SPLIT_PATTERNS.values():
        raise ValueError(f"has a split pattern that is none of {', '.join(SPLIT_PATTERNS)}: {pattern}")
    ranks, specials = _numbers(state["mergeable_ranks"], bytes), _numbers(state["special_tokens"], str)
    expected = {name: len(ranks) + number for number, name in enumerate(SPECIAL_TOKENS)}
    for name in sorted(expected.keys() | specials.keys()):
        if specials.get(name) != expected.get(name):
            raise ValueError(f"has the special token {name} as {specials.get(name)}, not {expected.get(name)}")
    return Tokenizer(_merges(ranks), pattern)


def _merges(ranks: dict[bytes, int]) -> list[bytes]:
    """Return the tokens after those of single bytes, in their order. Raises: ValueError if a rank is not as trained."""
    tokens = sorted(ranks, key=ranks.__getitem__)
    if len(tokens) < NUM_BYTES:
        raise ValueError(f"has {len(tokens)} tokens, not even one for each byte")
    known: set[bytes] = set()
    for number, token in enumerate(tokens):
        if ranks[token] != number:
            raise ValueError(f"has not one token of rank {number}")
        if number < NUM_BYTES and token != bytes([number]):
            raise ValueError(f"has {token[:16]!r} as rank {number}, where the byte of that value must be")
        if number >= NUM_BYTES and not _joins(token, known):
            raise ValueError(f"rank {number}, {token[:16]!r}, must join two tokens before it")
        known.add(token)
    return tokens[NUM_BYTES:]


def _numbers(value: Any, kind: type[Any]) -> dict[Any, int]:
    """Return a dict of numbers whose keys are of one type. Raises: ValueError."""
    return {_need(key, kind): _need(number, int) for key, number in _need(value, dict).items()}


def _joins(token: bytes, known: set[bytes]) -> bool:
    """Tell whether a token is two known ones; one that is too long is not looked at, for that takes its square."""
    return len(token) <= LONGEST_TOKEN_BYTES and any(
        token[:cut] in known and token[cut:] in known for cut in range(1, len(token))
    )
