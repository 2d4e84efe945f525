"""Pieces of answers to the JSON of OpenAI's API: one class each for chats and completions, whole and in chunks.

What is beside OpenAI's: `token_ids` and `prompt_token_ids` (vLLM's), and `parts`, in which calls of the calculator and
what it said stand beside the text.
"""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from nanochat.data.tokenizer import Tokenizer
from nanochat.inference.requests import Event
from nanochat.inference.sampling import Likelihood
from nanochat.inference.text_stream import Piece
from nanochat.serving.answers import Answers
from nanochat.serving.schema import ChatBody, CompletionBody


class ChatShape:
    """Answers of /v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatBody, answers: Answers) -> None:
        self.body, self.answers, self.tokenizer = body, answers, answers.model.tokenizer
        self.head = _head(self.prefix, answers)

    def first(self) -> list[dict[str, Any]]:
        """Return what every choice of a stream begins with."""
        return [
            _choice(number, delta={"role": "assistant", "content": ""}) for number in range(len(self.answers.requests))
        ]

    def choice(self, number: int, piece: Piece) -> dict[str, Any]:
        """Return the choice of a chunk."""
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if self.body.return_parts and piece.parts:
            delta["parts"] = [
                {"type": part.kind, "text": part.text} | ({"continues": True} if part.continues else {})
                for part in piece.parts
            ]
        return _choice(number, piece, delta=delta) | self._details(piece.events)

    def message(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the choice of a whole answer."""
        text = "".join(piece.text for piece in pieces)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.body.return_parts:
            parts: list[dict[str, str]] = []
            for part in (part for piece in pieces for part in piece.parts):
                if part.continues and parts:
                    parts[-1]["text"] += part.text
                else:
                    parts.append({"type": part.kind, "text": part.text})
            message["parts"] = parts
        events = [event for piece in pieces for event in piece.events]
        return _choice(number, pieces[-1], message=message) | self._details(events)

    def _details(self, events: Sequence[Event]) -> dict[str, Any]:
        details: dict[str, Any] = {"logprobs": None}
        if self.body.logprobs:
            content = [self._logprob(event) for event in events if event.likelihood]
            details["logprobs"] = {"content": content, "refusal": None}
        if self.body.return_token_ids:
            details["token_ids"] = [event.token for event in events]
        return details

    def _logprob(self, event: Event) -> dict[str, Any]:
        likelihood = event.likelihood
        assert likelihood is not None
        top = [self._token(id, logprob) for id, logprob in likelihood.likeliest]
        return self._token(event.token, likelihood.logprob) | {"top_logprobs": top}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.decode_bytes([id])
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


class CompletionShape:
    """Answers of /v1/completions. An echo has what was sent, so not the BOS that a text gets."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: CompletionBody, answers: Answers) -> None:
        self.body, self.answers, self.tokenizer = body, answers, answers.model.tokenizer
        self.head = _head(self.prefix, answers)
        self._offsets = [0] * len(answers.requests)
        self._is_begun = [False] * len(answers.requests)

    def first(self) -> list[dict[str, Any]]:
        """Return what every choice of a stream begins with: nothing."""
        return []

    def choice(self, number: int, piece: Piece) -> dict[str, Any]:
        """Return the choice of a chunk, or of a whole answer if the piece is one; an echo comes with the first."""
        text = "".join(part.text for part in piece.parts)
        ids = [event.token for event in piece.events]
        if self.body.max_tokens == 0:
            text, ids = "", []
        likelihoods = [event.likelihood for event in piece.events][: len(ids)]
        if self.body.echo and not self._is_begun[number]:
            request = self.answers.requests[number]
            prompt = list(request.prompt[: len(request.prompt) - request.continued])
            report = piece.events[0].prompt
            told = report.likelihoods if report else ()
            text = self.tokenizer.decode([id for id in prompt if id < self.tokenizer.bos]) + text
            unsent = self._is_text(number)
            likelihoods = [*[None, *told[: len(prompt) - 1]][unsent:], *likelihoods]
            ids = prompt[unsent:] + ids
        self._is_begun[number] = True
        choice = _choice(number, piece, text=text) | {"logprobs": None}
        if self.body.max_tokens == 0 and piece.finish_reason:
            choice["finish_reason"] = "length"
        if self.body.logprobs is not None:
            choice["logprobs"] = self._logprobs(number, ids, likelihoods)
        if self.body.return_token_ids:
            choice["token_ids"] = [event.token for event in piece.events] if self.body.max_tokens != 0 else []
        return choice

    def message(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the choice of a whole answer."""
        parts = [part for piece in pieces for part in piece.parts]
        events = [event for piece in pieces for event in piece.events]
        return self.choice(number, Piece(parts, events, pieces[-1].finish_reason))

    def _is_text(self, number: int) -> bool:
        prompt = self.body.prompt
        return isinstance(prompt, str) or isinstance(prompt[number // self.answers.n], str)

    def _logprobs(self, number: int, ids: Sequence[int], likelihoods: Sequence[Likelihood | None]) -> dict[str, Any]:
        texts = [self._text(id) for id in ids]
        offsets = []
        for id in ids:
            offsets.append(self._offsets[number])
            if id < self.tokenizer.bos:
                self._offsets[number] += len(self._text(id))
        return {
            "tokens": texts,
            "token_logprobs": [one and _finite(one.logprob) for one in likelihoods],
            "top_logprobs": [
                one and {self._text(i): _finite(p) for i, p in ((id, one.logprob), *reversed(one.likeliest))}
                for id, one in zip(ids, likelihoods, strict=True)
            ],
            "text_offset": offsets,
        }

    def _text(self, id: int) -> str:
        return _token_text(self.tokenizer, id)


def usage(body: ChatBody | CompletionBody, answers: Answers) -> dict[str, Any]:
    """Return the counts of tokens; the answer's end token and what a tool said are tokens of the answer."""
    completion_tokens = 0 if body.max_tokens == 0 else sum(answers.completion_tokens)
    return {
        "prompt_tokens": answers.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": answers.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answers.cached_tokens},
    }


def prompt_ids(answers: Answers) -> list[int]:
    """Return the ids of the first prompt."""
    request = answers.requests[0]
    return list(request.prompt[: len(request.prompt) - request.continued])


def _head(prefix: str, answers: Answers) -> dict[str, Any]:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": answers.model.name}


def _choice(number: int, piece: Piece | None = None, **content: Any) -> dict[str, Any]:
    reason = piece.finish_reason if piece else None
    return {"index": number, **content, "finish_reason": reason} | (
        {"stop_reason": piece.stop} if piece and reason else {}
    )


def _token_text(tokenizer: Tokenizer, id: int) -> str:
    """Return a token as OpenAI writes it: half a character as `bytes:` and their escapes."""
    data = tokenizer.decode_bytes([id])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    """JSON knows no infinity: what cannot be said has -9999, as OpenAI writes it."""
    return max(logprob, -9999.0)
