"""Questions to a stream of what is said, one conversation at a time: history, calculator, and a stop at any moment.

Source of the idea: the terminal chat of karpathy/nanochat, chat_cli.py. Not covered: several conversations at once.
"""

import codecs
from collections.abc import Iterator

from nanochat.data.conversations import Conversation, Message, Part, PartKind, parse_parts
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import ConfigError
from nanochat.inference.requests import Request, TokenSource

KIND_STARTS: dict[str, PartKind] = {"<|python_start|>": "python", "<|output_start|>": "python_output"}
LEAST_ROOM = 16
"""Tokens that a reply has at least, before old turns are forgotten for it."""


class ChatSession:
    """One conversation with a model."""

    def __init__(
        self, source: TokenSource, tokenizer: Tokenizer, capacity: int, *, max_new_tokens: int = 256,
        temperature: float = 0.0, top_k: int | None = None, repetition_penalty: float = 1.0, seed: int = 0,
    ) -> None:  # fmt: skip
        """Take a source of tokens, as a ToolLoop over an Engine, whose requests hold at most `capacity` tokens."""
        self.source, self.tokenizer, self.capacity = source, tokenizer, capacity
        self.max_new_tokens, self.temperature, self.top_k, self.seed = max_new_tokens, temperature, top_k, seed
        self.repetition_penalty = repetition_penalty
        self.turns: list[list[int]] = []
        """Ids of each turn, of user and assistant alternately."""
        self.forgotten = 0
        """Turns that were let go, since they did not fit any more."""
        self._end = tokenizer.special("<|assistant_end|>")

    def ask(self, text: str) -> Iterator[Part]:
        """Yield the reply in pieces as it comes; closing the iterator ends the reply, and what came of it stays.

        Raises: ConfigError if the text is empty or longer than the model can read; the conversation stays as it was.
        """
        if not text.strip():
            raise ConfigError("message='': must not be empty. Write something.")
        tokenizer = self.tokenizer
        user = [
            tokenizer.special("<|user_start|>"),
            *tokenizer.encode_ordinary(text),
            tokenizer.special("<|user_end|>"),
        ]
        if (needed := len(user) + 2 + LEAST_ROOM) > self.capacity:
            raise ConfigError(
                f"message: takes {needed} tokens with room for a reply, the model reads {self.capacity}. Shorten it."
            )
        del self.turns[len(self.turns) // 2 * 2 :]  # a question whose answer was never begun
        self.turns.append(user)
        while 2 + LEAST_ROOM + sum(map(len, self.turns)) > self.capacity:
            del self.turns[:2]  # a question and its answer
            self.forgotten += 2
        return self._reply()

    def _reply(self) -> Iterator[Part]:
        start = self.tokenizer.special("<|assistant_start|>")
        prompt = (self.tokenizer.bos, *(token for turn in self.turns for token in turn), start)
        request = Request(
            prompt=prompt, max_new_tokens=min(self.max_new_tokens, self.capacity - len(prompt)),
            stop_tokens=frozenset({self._end, self.tokenizer.bos}), temperature=self.temperature, top_k=self.top_k,
            repetition_penalty=self.repetition_penalty, seed=self.seed,
        )  # fmt: skip
        self.seed += 1
        said: list[int] = []
        self.turns.append([start])
        id = self.source.add(request)
        kind: PartKind = "text"
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        starts = {self.tokenizer.special(name): kind for name, kind in KIND_STARTS.items()}
        reason = None
        try:
            while reason is None:
                for event in self.source.step():
                    reason = event.finish_reason
                    said.append(event.token)
                    if event.token >= self.tokenizer.bos:
                        kind = starts.get(event.token, "text")
                    elif piece := decoder.decode(self.tokenizer.decode_bytes([event.token])):
                        yield Part(kind, piece)
        finally:
            self.source.abort(id)
            kept = said[:-1] if said and said[-1] in request.stop_tokens else said
            self.turns[-1] = [start, *kept, self._end]

    def forget(self) -> None:
        """Begin a new conversation."""
        self.turns, self.forgotten = [], 0

    def ids(self) -> list[int]:
        """Return the ids of the conversation, as the model reads them."""
        return [self.tokenizer.bos, *(token for turn in self.turns for token in turn)]

    def conversation(self) -> Conversation:
        """Return the conversation so far, without empty answers and calls or outputs that stand alone."""
        messages: list[Message] = []
        for question, reply in zip(self.turns[::2], self.turns[1::2]):
            said = [part for part in parse_parts(self.tokenizer, reply) if part.text.strip()]
            parts: list[Part] = []
            for part, following in zip(said, [*said[1:], Part("text", "")]):
                is_answered = part.kind == "python" and following.kind == "python_output"
                answers = part.kind == "python_output" and parts[-1:] and parts[-1].kind == "python"
                if part.kind == "text" or is_answered or answers:
                    parts.append(part)
            if parts:
                messages += [Message("user", parse_parts(self.tokenizer, question)), Message("assistant", tuple(parts))]
        return Conversation(tuple(messages))
