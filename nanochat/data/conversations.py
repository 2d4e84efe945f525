"""Messages to token ids and a loss mask: what the model reads, and which of it it learns to say.

A conversation is OpenAI's `messages`: user and assistant in turn, perhaps a system message before them, which joins the
first user turn. An assistant's content is text, or a list of parts: text, `python` (a call of the tool) and
`python_output` (what the tool said). Rendered it is

    <|bos|> <|user_start|> text <|user_end|> <|assistant_start|> text <|python_start|> call <|python_end|>
    <|output_start|> output <|output_end|> text <|assistant_end|> <|user_start|> ...

The mask is a function of the ids alone, because text can never become a special token: supervised is what follows
<|assistant_start|> up to and with <|assistant_end|>, but for <|output_start|> up to and with <|output_end|>, which the
tool says. So packed rows need no column for it.

Source: the tokens and what is supervised: karpathy/nanochat tokenizer.py@92d63d4, render_conversation.
Not covered: images, tools other than python, weights of single turns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import DataError, escaped, excerpt

PartKind = Literal["text", "python", "python_output"]
PART_TOKENS: dict[str, tuple[str, str]] = {
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}
"""The tokens around a part; text stands bare."""


@dataclass(frozen=True)
class Part:
    """A piece of a message."""

    kind: PartKind
    text: str


@dataclass(frozen=True)
class Message:
    """What one side says in its turn."""

    role: Literal["user", "assistant"]
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts, joined: calls of tools and their output are not in it."""
        return "".join(part.text for part in self.parts if part.kind == "text")


@dataclass(frozen=True)
class Conversation:
    """User and assistant in turn, the user first."""

    messages: tuple[Message, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    """What a task needs to judge a reply, such as the right answer."""


def exchange(question: str, answer: str | Iterable[Part], /, **facts: Any) -> Conversation:
    """Return a conversation of one question and one answer."""
    parts = (Part("text", answer),) if isinstance(answer, str) else tuple(answer)
    return Conversation((Message("user", (Part("text", question),)), Message("assistant", parts)), facts)


def parse_conversation(value: object, where: str, *, answered: bool = True) -> Conversation:
    """Check a JSON value in the `messages` form and return the conversation.

    `where` names it in errors, as FILE:LINE. With `answered` it must end with the assistant, else with the user.
    Raises: DataError naming `where`, the message and the rule that it breaks.
    """
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: messages={excerpt(messages)}: must be a list that is not empty. Drop or mend the line."
        )
    parsed: list[Message] = []
    system: str | None = None
    for number, message in enumerate(messages):
        at = f"{where}: messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if number == 0 and role == "system":
            system = "".join(part.text for part in _parts_of(message, at, "user"))
            continue
        expected = "assistant" if len(parsed) % 2 else "user"
        if role != expected:
            raise DataError(
                f"{at}.role={excerpt(role)}: must be {expected} here: user and assistant in turn, after at most one "
                "system message. Drop or mend the line."
            )
        parts = _parts_of(message, at, expected)
        if system is not None:
            parts, system = (Part("text", f"{system}\n\n{parts[0].text}"), *parts[1:]), None
        parsed.append(Message(expected, parts))
    if not parsed or (parsed[-1].role == "assistant") != answered:
        last = "assistant" if answered else "user"
        raise DataError(f"{where}: messages end with another role than {last}. Drop the line or its last message.")
    return Conversation(tuple(parsed))


def _parts_of(message: dict[str, Any], at: str, role: str) -> tuple[Part, ...]:
    """Return a message's parts, checked."""
    if message.get("tool_calls"):
        raise DataError(f"{at}.tool_calls: are not read. Write calls as parts of type python and python_output.")
    content = message.get("content")
    listed = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{at}.content={excerpt(content)}: must be a text or a list of parts. Drop or mend the line.")
    allowed = ("text", "python", "python_output") if role == "assistant" else ("text",)
    parts: list[Part] = []
    for number, part in enumerate(listed):
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind is None or kind not in allowed:
            raise DataError(
                f"{at}.content[{number}].type={excerpt(kind)}: must be one of {', '.join(allowed)} in a message of the "
                f"{role}. Drop or mend the line."
            )
        if not isinstance(text, str) or not (text.strip() or kind == "python_output"):
            raise DataError(f"{at}.content[{number}].text={excerpt(text)}: must be a text that is not empty. "
                            "Drop or mend the line.")  # fmt: skip
        if (kind == "python_output") != bool(parts and parts[-1].kind == "python"):
            raise DataError(
                f"{at}.content[{number}].type={kind}: every python part is followed by its python_output, and no other "
                "part is. Drop or mend the line."
            )
        parts.append(Part(cast(PartKind, kind), text))
    if parts[-1].kind == "python":
        raise DataError(f"{at}.content: ends with a python part. Add its python_output.")
    return tuple(parts)


def as_messages(conversation: Conversation) -> dict[str, Any]:
    """Return a conversation in the `messages` form; `parse_conversation` gives it back."""
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        parts = [{"type": part.kind, "text": part.text} for part in message.parts]
        plain = len(parts) == 1 and parts[0]["type"] == "text"
        messages.append({"role": message.role, "content": parts[0]["text"] if plain else parts})
    return {"messages": messages}


def render(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Return the ids of a whole conversation, BOS first."""
    ids = [tokenizer.bos]
    for message in conversation.messages:
        ids.append(tokenizer.special(f"<|{message.role}_start|>"))
        ids += render_parts(tokenizer, message.parts)
        ids.append(tokenizer.special(f"<|{message.role}_end|>"))
    return ids


def render_prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Return the ids up to where the assistant replies to the last user message; a reply that is there is left out."""
    messages = conversation.messages
    asked = messages[:-1] if messages[-1].role == "assistant" else messages
    return [*render(tokenizer, Conversation(asked)), tokenizer.special("<|assistant_start|>")]


def render_parts(tokenizer: Tokenizer, parts: Iterable[Part]) -> list[int]:
    """Return the ids of parts, with the tokens around calls and outputs."""
    ids: list[int] = []
    for part in parts:
        inner = tokenizer.encode_ordinary(part.text)
        if part.kind in PART_TOKENS:
            start, end = PART_TOKENS[part.kind]
            inner = [tokenizer.special(start), *inner, tokenizer.special(end)]
        ids += inner
    return ids


def supervised(tokenizer: Tokenizer, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which ids the model learns to say, of the shape of `ids`; the last axis is the position."""

    def count(name: str) -> npt.NDArray[np.int64]:
        return np.cumsum(ids == tokenizer.special(name), axis=-1)

    ended = count("<|assistant_end|>") - (ids == tokenizer.special("<|assistant_end|>"))
    told = count("<|output_end|>") - (ids == tokenizer.special("<|output_end|>"))
    speaks = (count("<|assistant_start|>") > ended) & (ids != tokenizer.special("<|assistant_start|>"))
    return speaks & (count("<|output_start|>") == told)


def parse_parts(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[Part, ...]:
    """Return the parts of a reply from its ids, whatever a model made of them; other special tokens fall away."""
    kinds = {tokenizer.special(start): kind for kind, (start, _) in PART_TOKENS.items()}
    ends = {tokenizer.special(end) for _, end in PART_TOKENS.values()}
    parts: list[Part] = []
    kind: Any = "text"
    run: list[int] = []
    for token in [*ids, -1]:
        if 0 <= token < tokenizer.bos:
            run.append(token)
            continue
        if token in kinds or token in ends or token == -1:
            if run:
                parts.append(Part(kind, tokenizer.decode(run)))
            kind, run = kinds.get(token, "text"), []
    return tuple(parts)


def coloured(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return ids as text for a terminal: green is supervised, grey is not, special tokens stand in reverse."""
    mask = supervised(tokenizer, np.asarray(ids))
    shown = []
    for token, says in zip(ids, mask.tolist(), strict=True):
        text = tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace")
        text = "\n".join(escaped(line) for line in text.split("\n"))
        shown.append(f"\x1b[{'32' if says else '90'}{';7' if token >= tokenizer.bos else ''}m{text}\x1b[0m")
    return "".join(shown)
