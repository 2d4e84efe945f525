"""Bodies of OpenAI's API, checked, to what an engine is asked.

Unknown fields are ignored, as clients send many; known fields that nothing here acts on are refused. Sampling
parameters that OpenAI does not have are vLLM's, and so are `return_token_ids` and the ids in answers.
`continue_token_ids` is ours. Of vLLM's and transformers' fields those are known that would change an answer.

Sources: OpenAI's API reference (chat, completions); vLLM docs, "OpenAI-Compatible Server".
"""

import math
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nanochat.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.inference.requests import Request
from nanochat.serving.backend import ServedModel
from nanochat.serving.errors import ApiError, refused

MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_BIASES = 300
MAX_TOKENIZE_CHARS = 200_000
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's, of /v1/completions."""

NOT_HERE: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,), "add_special_tokens": (False,), "allowed_token_ids": ([],), "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (), "chat_template_kwargs": ({},), "continue_final_message": (False,), "documents": ([],),
    "echo": (False,), "guided_choice": ([],), "guided_grammar": (), "guided_json": (), "guided_regex": (),
    "include_stop_str_in_output": (False,), "logits_processors": ([],), "no_repeat_ngram_size": (0,), "num_beams": (1,),
    "prompt_logprobs": (), "repetition_detection": (), "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,), "structural_tag": (), "structured_outputs": (), "thinking_token_budget": (),
    "truncate_prompt_tokens": (), "typical_p": (1,), "use_beam_search": (False,), "vllm_xargs": ({},),
}  # fmt: skip
"""Fields of vLLM and transformers that would change an answer, and the values at which they do not."""

Penalty = Annotated[float, Field(ge=-2, le=2)]
Id = Annotated[int, Field(ge=0, lt=1 << 32)]
Ids = Annotated[list[Id], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Body):
    """What a stream has beside the answer."""

    include_usage: bool | None = None


class SamplingBody(_Body):
    """What chats and completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = (
        None
    )
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    return_token_ids: bool | None = None
    continue_token_ids: Ids | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_others(cls, body: Any) -> Any:
        """Raises: ApiError for a field of NOT_HERE."""
        for name, harmless in NOT_HERE.items() if isinstance(body, dict) else ():
            if name not in cls.model_fields and body.get(name) is not None and body[name] not in harmless:
                raise refused(name, "is not supported, and without it the answer would be another. Leave it out.")
        return body

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatBody(SamplingBody):
    """The body of /v1/chat/completions."""

    messages: list[Any]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    return_parts: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None

    def check(self) -> None:
        """Raises: ApiError for what is not here."""
        if (self.tools and self.tool_choice != "none") or (self.functions and self.function_call != "none"):
            name = "tools" if self.tools else "functions"
            raise refused(name, "are not called by these models; they have a calculator of their own. Leave it out.")
        if self.tool_choice not in (None, "none", "auto") or self.function_call not in (None, "none", "auto"):
            name = "function_call" if self.tool_choice in (None, "none", "auto") else "tool_choice"
            raise refused(name, "there are no tools to choose. Leave it out.")
        if self.response_format not in (None, {"type": "text"}):
            raise refused("response_format", 'must be {"type": "text"}: answers cannot be bound to a format here.')
        if self.modalities not in (None, ["text"]) or self.audio is not None:
            raise refused("audio" if self.audio is not None else "modalities", "text is all that there is.")
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "needs logprobs to be true.")
        if self.max_tokens == 0:
            raise refused("max_tokens", "must be at least 1.")


class CompletionBody(SamplingBody):
    """The body of /v1/completions."""

    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    def check(self) -> None:
        """Raises: ApiError for what is not here."""
        if self.suffix:
            raise refused("suffix", "is not supported: these models continue a text at its end. Leave it out.")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise refused("best_of", "must be equal to n. Leave it out.")
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "must be at least 1, or 0 with echo.")
        if self.add_special_tokens is False:
            raise refused("add_special_tokens", "must be true: a text always gets <|bos|>. Send ids to do without.")
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        is_scored = self.echo and self.logprobs is not None
        if is_scored and any(isinstance(one, str) and one.startswith("<|bos|>") for one in texts):
            raise refused("prompt", "begins with <|bos|>, which as text is seven characters; every text gets the token "
                          "by itself. Leave it out.")  # fmt: skip


class TokenizeBody(_Body):
    """The body of /tokenize."""

    model: str | None = None
    prompt: Annotated[str, Field(max_length=MAX_TOKENIZE_CHARS)] | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Body):
    """The body of /detokenize."""

    model: str | None = None
    tokens: Ids


Kind = Literal["chat", "completion"]


def requests_of(
    body: SamplingBody, model: ServedModel, prompts: Sequence[Sequence[int]], *, logprobs: int | None = None,
    prompt_logprobs: int | None = None, default_tokens: int | None = None,
) -> list[Request]:  # fmt: skip
    """Return what the engine is asked: n requests for each prompt, in order; choice i of a prompt has seed + i.

    `max_tokens` is a limit: where the context has less room, that is the limit. `default_tokens`: where a body has
    none; none = as many as there is room for. Raises: ApiError if a prompt is too long, or a value breaks a rule.
    """
    tokenizer, defaults = model.tokenizer, model.defaults
    ends = {tokenizer.special("<|assistant_end|>"), tokenizer.bos}
    begun = tuple(body.continue_token_ids or ())
    asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
    if asked is not None and asked > model.capacity:
        name = "max_completion_tokens" if getattr(body, "max_completion_tokens", None) else "max_tokens"
        raise refused(name, f"is {asked}; this model has {model.capacity} tokens, prompt included.")
    asked = default_tokens if asked is None else max(1, asked)
    bias = _bias(body, tokenizer)
    stop_ids = [_checked(id, "stop_token_ids", tokenizer) for id in body.stop_token_ids or ()]
    stop_tokens = frozenset(stop_ids) | (frozenset() if body.ignore_eos else frozenset(ends))
    if begun:
        if (body.n or 1) * len(prompts) > 1:
            raise refused("continue_token_ids", "goes on with one answer to one prompt. Set n to 1.")
        check_answer(tokenizer, begun, stop_tokens)
    seed = secrets.randbits(48) if body.seed is None else body.seed
    values: dict[str, Any] = {
        name: defaults.get(name, default) if getattr(body, name) is None else getattr(body, name)
        for name, default in (
            ("temperature", 1.0), ("top_p", 1.0), ("top_k", None), ("min_p", 0.0), ("repetition_penalty", 1.0),
            ("presence_penalty", 0.0), ("frequency_penalty", 0.0),
        )
    }  # fmt: skip
    values["top_k"] = int(values["top_k"]) if (values["top_k"] or 0) > 0 else None
    requests = []
    for prompt in prompts:
        room = model.capacity - len(prompt)
        if room < 1:
            raise ApiError(
                400, f"the prompt has {len(prompt)} tokens; this model reads {model.capacity}, answer included. "
                "Shorten it.", "messages" if hasattr(body, "messages") else "prompt", "context_length_exceeded",
            )  # fmt: skip
        limit = room if asked is None else min(asked, room)
        if len(begun) >= limit:
            raise refused("continue_token_ids", f"the answer has its {limit} tokens already. Raise max_tokens.")
        for choice in range(body.n or 1):
            requests.append(
                Request(
                    prompt=(*prompt, *begun), max_new_tokens=limit - len(begun), continued=len(begun),
                    stop_tokens=stop_tokens, seed=seed + choice, logit_bias=bias, logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs, min_new_tokens=min(body.min_tokens or 0, limit), **values,
                )
            )  # fmt: skip
    return requests


def _checked(id: int, param: str, tokenizer: Tokenizer) -> int:
    if not 0 <= id < tokenizer.vocab_size:
        raise refused(param, f"{id} is no id of this model's {tokenizer.vocab_size} tokens.")
    return id


def _bias(body: SamplingBody, tokenizer: Tokenizer) -> dict[int, float]:
    """Return the bias by id; -100 bans a token, as OpenAI says."""
    bias: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise refused("logit_bias", "keys must be token ids written as strings.")
        bias[_checked(int(key), "logit_bias", tokenizer)] = -math.inf if value == -100 else value
    if sum(value == -math.inf for value in bias.values()) >= tokenizer.vocab_size - len(SPECIAL_TOKENS):
        raise refused("logit_bias", "bans every token. Leave some.")
    return bias


def check_answer(tokenizer: Tokenizer, ids: Sequence[int], ends: frozenset[int]) -> None:
    """Raises: ApiError if ids cannot be the beginning of an answer that goes on."""
    names = ("<|python_end|>", "<|output_start|>", "<|output_end|>")
    called, output, told = (tokenizer.special(name) for name in names)
    param = "continue_token_ids"
    inside = False
    for before, id in zip([-1, *ids], ids):
        _checked(id, param, tokenizer)
        if id in ends:
            raise refused(param, f"{id} is an end token: the answer is complete.")
        if (before == called) != (id == output) or (id == told and not inside):
            raise refused(param, "a call and the tool's output must follow each other, as they were sent.")
        if inside and id >= tokenizer.bos and id != told:
            raise refused(param, f"{id} cannot stand in a tool's output.")
        inside = (inside or id == output) and id != told
    if inside:
        raise refused(param, "must not end inside a tool's output. Send the ids as whole as they came.")
