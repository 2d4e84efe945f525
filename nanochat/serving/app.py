"""The whole endpoint as one FastAPI app over a backend: OpenAI's API, tokenizers, health, metrics, the chat page.

Bodies are read and checked here, not by FastAPI: so they are bounded, and every error has OpenAI's envelope.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import nanochat
from nanochat.config.serving import ServingConfig
from nanochat.data.tokenizer import SPECIAL_TOKENS
from nanochat.inference.requests import Request as TokenRequest
from nanochat.inference.text_stream import Piece
from nanochat.serving.answers import Admission, Answers
from nanochat.serving.backend import Backend, ServedModel
from nanochat.serving.errors import ApiError, http_error, invalid_body, refused
from nanochat.serving.event_stream import ClientGoneError, EventStream, event, unless_gone
from nanochat.serving.gate import Gate, api_keys
from nanochat.serving.metrics import Metrics
from nanochat.serving.prompts import chat_prompt, completion_prompts
from nanochat.serving.schema import (
    DEFAULT_COMPLETION_TOKENS,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    requests_of,
)  # fmt: skip
from nanochat.serving.shapes import ChatShape, CompletionShape, prompt_ids, usage

PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CLIENT_CLOSED = 499
BODY_TIMEOUT_S, SEND_SPARE_S = 30.0, 5.0
BodyT = TypeVar("BodyT", bound=BaseModel)


def create_app(backend: Backend, config: ServingConfig) -> FastAPI:
    """Return the endpoint. Raises: ConfigError if it could be reached by others without a key."""
    app = FastAPI(title="nanochat", version=nanochat.__version__, redirect_slashes=False, docs_url=None, redoc_url=None)
    endpoint = _Endpoint(backend, config, app)
    for path, handler in (
        ("/", endpoint.page), ("/health", endpoint.health), ("/ready", endpoint.ready), ("/version", endpoint.version),
        ("/metrics", endpoint.show_metrics), ("/v1/models", endpoint.list_models),
        ("/v1/models/{name:path}", endpoint.get_model), ("/tokenizer_info", endpoint.tokenizer_info),
    ):  # fmt: skip
        app.add_api_route(path, handler, methods=["GET"], response_model=None)
        app.add_api_route(path, handler, methods=["HEAD"], response_model=None, include_in_schema=False)
    for path, handler, body in (
        ("/v1/chat/completions", endpoint.chat, ChatBody), ("/v1/completions", endpoint.complete, CompletionBody),
        ("/tokenize", endpoint.tokenize, TokenizeBody), ("/detokenize", endpoint.detokenize, DetokenizeBody),
    ):  # fmt: skip
        content = {"application/json": {"schema": _inlined(body)}}
        app.add_api_route(
            path, handler, methods=["POST"], response_model=None, openapi_extra={"requestBody": {"content": content}}
        )
    for kind, show in ((ApiError, _show), (HTTPException, _show_http)):
        app.add_exception_handler(kind, show)
    app.add_middleware(Gate, keys=api_keys(config), origins=config.cors_origins, metrics=endpoint.metrics)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    return app


async def _show(request: Request, err: Exception) -> Response:
    assert isinstance(err, ApiError)
    # The message may quote what was sent, which is in no log.
    request.state.facts |= {"error": err.code or "refused", **({"param": err.param} if err.param else {})}
    return JSONResponse(err.body, err.status, err.headers)


async def _show_http(request: Request, err: Exception) -> Response:
    assert isinstance(err, HTTPException)
    return JSONResponse(http_error(err.status_code).body, err.status_code, err.headers)


class _Endpoint:
    """The handlers."""

    def __init__(self, backend: Backend, config: ServingConfig, app: FastAPI) -> None:
        self.backend, self.config, self.app = backend, config, app
        self.metrics = Metrics(backend)
        app.state.draining = False
        self.admission = Admission(backend, config)
        self._page = resources.files("nanochat.serving").joinpath("ui.html").read_text("utf-8")

    async def page(self) -> Response:
        """Return the chat page, whose own script is the only one that a browser runs there."""
        nonce = secrets.token_urlsafe(16)
        headers = {"Content-Security-Policy": PAGE_POLICY.format(nonce=nonce), "X-Content-Type-Options": "nosniff",
                   "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}  # fmt: skip
        return HTMLResponse(self._page.replace("__NONCE__", nonce), headers=headers)

    async def health(self) -> Response:
        """Tell whether this replica lives."""
        if not self.backend.is_healthy:
            raise ApiError(503, "the engine has died.", code="engine_dead")
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Tell whether requests should come here."""
        if self.app.state.draining:
            raise ApiError(503, "this replica is ending; it takes nothing new.", code="draining")
        return await self.health()

    async def show_metrics(self) -> Response:
        """Return this replica's metrics for Prometheus."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def version(self) -> dict[str, str]:
        """Return the version of the code, and what computes the answers."""
        return {"version": nanochat.__version__, "backend": self.config.backend, "dtype": self.config.dtype}

    async def list_models(self) -> dict[str, Any]:
        """Return what can be asked."""
        return {"object": "list", "data": [_card(model) for model in self.backend.models.values()]}

    async def get_model(self, name: str) -> dict[str, Any]:
        """Return one model."""
        return _card(self._model(name))

    async def tokenizer_info(self, model: str | None = None) -> dict[str, Any]:
        """Return what lm-eval asks of a tokenizer."""
        found = self._model(model)
        return {
            "tokenizer_class": "nanochat-bpe", "vocab_size": found.tokenizer.vocab_size, "chat_template": None,
            "bos_token": "<|bos|>", "eos_token": "<|assistant_end|>" if found.is_chat else "<|bos|>",
            "pad_token": None, "unk_token": None, "additional_special_tokens": list(SPECIAL_TOKENS),
            "model_max_length": found.capacity, "max_model_len": found.capacity,
        }  # fmt: skip

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """Return the ids of a text or of messages."""
        body = await self._body(request, TokenizeBody)
        model = self._model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise refused("prompt", "give either prompt or messages.")
        if body.messages is not None:
            ids = chat_prompt(model.tokenizer, body.messages, self.config.max_messages)
            ids = ids[:-1] if body.add_generation_prompt is False else ids
        elif body.add_special_tokens is False and body.prompt in SPECIAL_TOKENS:  # who asks so wants its id
            raise refused("prompt", f"no text becomes {body.prompt}, which is {model.tokenizer.special(body.prompt)}.")
        else:
            ids = model.tokenizer.encode_ordinary(body.prompt or "")
            ids = ids if body.add_special_tokens is False else [model.tokenizer.bos, *ids]
        told: dict[str, Any] = {"count": len(ids), "max_model_len": model.capacity, "tokens": ids}
        if body.return_token_strs:
            told["token_strs"] = [model.tokenizer.decode([id]) for id in ids]
        return told

    async def detokenize(self, request: Request) -> dict[str, Any]:
        """Return the text of ids."""
        body = await self._body(request, DetokenizeBody)
        tokenizer = self._model(body.model).tokenizer
        if body.tokens and max(body.tokens) >= tokenizer.vocab_size:
            raise refused("tokens", f"{max(body.tokens)} is no id of this model's {tokenizer.vocab_size} tokens.")
        return {"prompt": tokenizer.decode(body.tokens)}

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        body = await self._body(request, ChatBody)
        model = self._model(body.model)
        body.check()
        self._check_n(body.n or 1)
        if not model.is_chat:
            raise refused("model", f"{model.name} is a base model and knows no turns. Use /v1/completions.")
        prompt = chat_prompt(model.tokenizer, body.messages, self.config.max_messages)
        logprobs = body.top_logprobs or 0 if body.logprobs else None
        requests = requests_of(body, model, [prompt], logprobs=logprobs)
        return await self._answer(request, body, model, requests)

    async def complete(self, request: Request) -> Response:
        """Continue texts."""
        body = await self._body(request, CompletionBody)
        model = self._model(body.model)
        body.check()
        prompts = completion_prompts(model.tokenizer, body.prompt, self.config.max_n)
        self._check_n((body.n or 1) * len(prompts))
        requests = requests_of(
            body, model, prompts, logprobs=body.logprobs, prompt_logprobs=body.logprobs if body.echo else None,
            default_tokens=DEFAULT_COMPLETION_TOKENS,
        )  # fmt: skip
        return await self._answer(request, body, model, requests)

    async def _answer(
        self, request: Request, body: ChatBody | CompletionBody, model: ServedModel, requests: list[TokenRequest]
    ) -> Response:
        """Return answers whole or as a stream, whose first event has come."""
        answers = Answers(self.admission, model, requests, body.stops, body.n or 1)
        shape = ChatShape(body, answers) if isinstance(body, ChatBody) else CompletionShape(body, answers)
        facts = request.state.facts
        facts |= {
            "id": shape.head["id"],
            "model": answers.model.name,
            "stream": bool(body.stream),
            "prompt_tokens": answers.prompt_tokens,
        }
        if self.config.log_contents:
            facts["request"] = body.model_dump(exclude_none=True)
        is_handed_on = False
        try:
            if not body.stream:
                return await unless_gone(request, self._whole(body, shape, facts))
            events = self._events(body, shape, facts)
            first = await unless_gone(request, anext(events))
            is_handed_on = True
            return EventStream(_chain(first, events), self.config.request_s + SEND_SPARE_S, answers.close)
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED)
        finally:
            if not is_handed_on:
                answers.close()

    async def _whole(
        self, body: ChatBody | CompletionBody, shape: ChatShape | CompletionShape, facts: dict[str, Any]
    ) -> Response:
        answers = shape.answers
        pieces: list[list[Piece]] = [[] for _ in answers.requests]
        try:
            async with aclosing(answers.pieces()) as coming:
                async for number, piece in coming:
                    pieces[number].append(piece)
        finally:
            self._count(answers, facts)
        choices = [shape.message(number, of_one) for number, of_one in enumerate(pieces)]
        whole = shape.head | {"object": shape.whole, "choices": choices, "usage": usage(body, answers)}
        if body.return_token_ids:
            whole["prompt_token_ids"] = prompt_ids(answers)
        if self.config.log_contents:
            facts["choices"] = choices
        return JSONResponse(whole)

    async def _events(
        self, body: ChatBody | CompletionBody, shape: ChatShape | CompletionShape, facts: dict[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        answers = shape.answers
        head = shape.head | {"object": shape.chunk}
        has_usage = bool(body.stream_options and body.stream_options.include_usage)
        tail = {"usage": None} if has_usage else {}
        beginning = {"prompt_token_ids": prompt_ids(answers)} if body.return_token_ids else {}
        is_first = True
        try:
            async with aclosing(answers.pieces()) as coming:
                async for number, piece in coming:
                    choice = shape.choice(number, piece)
                    data = event(head | {"choices": [choice]} | tail)
                    if is_first:
                        is_first = False
                        firsts = [head | {"choices": [one]} | tail for one in shape.first()]
                        if firsts:
                            firsts[0] |= beginning
                        else:
                            data = event(head | {"choices": [choice]} | tail | beginning)
                        data = b"".join(map(event, firsts)) + data
                    yield data
            if has_usage:
                yield event(head | {"choices": [], "usage": usage(body, answers)})
        finally:
            self._count(answers, facts)

    def _count(self, answers: Answers, facts: dict[str, Any]) -> None:
        elapsed_s = time.monotonic() - answers.began_s
        self.metrics.count(answers, elapsed_s)
        facts |= {"completion_tokens": sum(answers.completion_tokens), "finish_reasons": answers.finish_reasons,
                  "cached_tokens": answers.cached_tokens}  # fmt: skip
        if answers.first_token_s is not None:
            facts["first_token_s"] = round(answers.first_token_s, 4)

    def _check_n(self, count: int) -> None:
        if count > self.config.max_n:
            raise refused("n", f"asks for {count} answers at once, at most {self.config.max_n} are given.")

    def _model(self, name: str | None) -> ServedModel:
        models = self.backend.models
        if name is None:
            if len({model.tokenizer.hash for model in models.values()}) > 1:
                raise refused("model", f"must be named, as tokenizers differ. There are: {', '.join(models)}.")
            return next(iter(models.values()))
        if name not in models:
            raise ApiError(404, f"model: there is no {name[:100]!r}. There are: {', '.join(models)}.", "model",
                           "model_not_found")  # fmt: skip
        return models[name]

    async def _body(self, request: Request, kind: type[BodyT]) -> BodyT:
        """Read a body that is not too large. Raises: ApiError; ClientDisconnect if the client hangs up."""
        limit, data = self.config.max_body_bytes, bytearray()
        told = request.headers.get("content-length", "0")
        too_large = ApiError(413, f"body: has more than {limit} bytes. Send less.", code="body_too_large")
        if told.isdigit() and int(told) > limit:
            raise too_large
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > limit:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"body: has not come within {BODY_TIMEOUT_S:g} s.", code="body_timeout") from None
        try:
            return kind.model_validate_json(bytes(data))
        except ValidationError as err:
            raise invalid_body(err) from None


def _inlined(body: type[BaseModel]) -> dict[str, Any]:
    """Return a body's JSON schema without references, which would not be found in the OpenAPI page."""
    schema = body.model_json_schema()
    known = schema.pop("$defs", {})

    def walk(one: Any) -> Any:
        if isinstance(one, dict):
            if "$ref" in one:
                return walk(known[one["$ref"].rpartition("/")[2]])
            return {name: walk(value) for name, value in one.items()}
        return [walk(value) for value in one] if isinstance(one, list) else one

    return walk(schema)


async def _chain(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest) as events:
        yield first
        async for data in events:
            yield data


def _card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name, "object": "model", "created": model.created, "owned_by": "nanochat",
        "root": model.checkpoint, "kind": "chat" if model.is_chat else "base", "max_model_len": model.capacity,
        "generation_config": dict(model.defaults),
    }  # fmt: skip
