"""Tokens of an answer to text that can be shown at once: nothing is let go that a later token could change.

A token is held back while its last character is not whole, or while a stop string may have begun in what is not let go
yet. Tokens leave whole: text and ids that were let go belong together, so an answer that was cut off is continued from
the ids that its reader has. Stop strings are looked for in the text alone, not in calls of tools and their output.

Source of the idea: the hold-back of stop strings of vLLM's detokenizer. Not covered: stop strings inside calls.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.data.conversations import PART_TOKENS, PartKind
from nanochat.data.tokenizer import Tokenizer
from nanochat.inference.requests import Event, FinishReason


@dataclass(frozen=True)
class StreamPart:
    """A piece of a part of an answer."""

    kind: PartKind
    text: str
    continues: bool
    """Whether it belongs to the part that the piece before it was of."""


@dataclass
class _Held:
    event: Event
    kind: PartKind
    part: int
    text: str
    is_whole: bool
    """Whether no character is left half."""


@dataclass(frozen=True)
class Piece:
    """What is let go together."""

    parts: list[StreamPart]
    events: list[Event]
    finish_reason: FinishReason | None
    stop: str | None = None
    """The stop string that ended the answer."""

    @property
    def text(self) -> str:
        """What the answer says, without calls of tools and their output."""
        return "".join(part.text for part in self.parts if part.kind == "text")


class TextStream:
    """One answer; `push` what comes, as it comes."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), begun: Sequence[int] = ()) -> None:
        """Take the stop strings, and the ids of an answer that is continued: their text was let go already."""
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._kinds: dict[int, PartKind] = {}
        for kind, (start, _) in PART_TOKENS.items():
            self._kinds[tokenizer.special(start)] = "python" if kind == "python" else "python_output"
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._kind: PartKind = "text"
        self._part, self._last_part = 0, -1
        self._held: list[_Held] = []
        self._begun = len(begun)
        """Tokens at the front that are not given again."""
        if begun:
            self.push([Event(0, token) for token in begun])
            self._last_part = max((one.part for one in self._held if one.text), default=self._last_part)

    def push(self, events: Sequence[Event]) -> Piece:
        """Take an answer's next tokens and return what can be let go; an answer that has ended takes no more."""
        finish_reason = None
        for event in events:
            self._hold(event)
            finish_reason = event.finish_reason
            if found := self._stop_found():
                return self._let_go(len(self._held), "stop", *found)
        if finish_reason is not None:
            self._flush(self._held[-1])
            if found := self._stop_found():
                return self._let_go(len(self._held), "stop", *found)
            return self._let_go(len(self._held), finish_reason)
        return self._let_go(self._safe_count(), None)

    def _hold(self, event: Event) -> None:
        """Add a token and its text; a special token has none, and ends the part before it."""
        tokenizer = self._tokenizer
        if event.token >= tokenizer.bos:
            if self._held:
                self._flush(self._held[-1])
            self._decoder.reset()
            self._kind = self._kinds.get(event.token, "text")
            self._part += 1
            self._held.append(_Held(event, self._kind, self._part, "", True))
            return
        text = self._decoder.decode(tokenizer.decode_bytes([event.token]))
        is_whole = not self._decoder.getstate()[0]
        self._held.append(_Held(event, self._kind, self._part, text, is_whole))

    def _flush(self, last: _Held) -> None:
        """Half a character that nothing completes becomes U+FFFD."""
        last.text += self._decoder.decode(b"", final=True)
        last.is_whole = True

    def _stop_found(self) -> tuple[str, int] | None:
        """Return the stop string that has been completed, and the characters of held text before it."""
        if not self._stops:
            return None
        text = "".join(one.text for one in self._held if one.kind == "text")
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if not places:
            return None
        place, stop = min(places)
        return stop, place

    def _safe_count(self) -> int:
        """Return how many held tokens nothing that comes can change."""
        text = "".join(one.text for one in self._held if one.kind == "text")
        longest = max(map(len, self._stops), default=1)
        safe = next(
            (begin for begin in range(max(0, len(text) - longest + 1), len(text))
             if any(stop.startswith(text[begin:]) for stop in self._stops)),
            len(text),
        )  # fmt: skip
        count = end = 0
        for number, one in enumerate(self._held, start=1):
            end += len(one.text) if one.kind == "text" else 0
            if end > safe:
                break
            if one.is_whole:
                count = number
        return count

    def _let_go(
        self, count: int, finish_reason: FinishReason | None, stop: str | None = None, left: int | None = None
    ) -> Piece:
        """Return the first `count` held tokens, their text cut after `left` characters."""
        going, self._held = self._held[:count], self._held[count:]
        parts: list[StreamPart] = []
        events: list[Event] = []
        for one in going:
            text = one.text
            if one.kind == "text" and left is not None:
                text, left = text[:left], max(0, left - len(text))
            is_given = self._begun > 0
            if is_given:
                self._begun -= 1
            else:
                events.append(one.event)
            if not text:
                continue
            if is_given:
                self._last_part = one.part
                continue
            continues = one.part == self._last_part
            if continues and parts:
                parts[-1] = StreamPart(one.kind, parts[-1].text + text, parts[-1].continues)
            else:
                parts.append(StreamPart(one.kind, text, continues))
            self._last_part = one.part
        return Piece(parts, events, finish_reason, stop)
