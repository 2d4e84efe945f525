"""A prompt to a group of samples: what the policy said, how likely each token was, and what it was worth.

Which problem a group is of, and what each of its samples draws, are functions of (seed, group, sample) alone: whoever
samples it, and however often it is begun anew, with the same weights it is the same. Weights may change while it is
sampled: the engine goes on from the tokens that are there, and each token is stamped with the policy that said it.

Source of the idea of going on under new weights: partial rollouts of AReaL, arXiv 2505.24298, section 4.
"""

import contextlib
import functools
import importlib
import inspect
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
import torch

from nanochat.config.model import ModelConfig
from nanochat.config.rl import RLConfig
from nanochat.config.serving import EngineName
from nanochat.data.conversations import Conversation, parse_parts, render_prompt
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import ConfigError, excerpt
from nanochat.evaluation.chat import shown
from nanochat.inference.engine import Engine
from nanochat.inference.requests import Event, FinishReason, InferenceEngine, Request
from nanochat.inference.tool_loop import ToolLoop
from nanochat.inference.vllm_engine import VllmEngine
from nanochat.model.gpt import GPT
from nanochat.tasks.task import Task


@dataclass
class Sample:
    """One completion; lists have an entry for each of its tokens."""

    tokens: list[int] = field(default_factory=list)
    """The end token, where the model said it, is the last."""
    is_forced: list[bool] = field(default_factory=list)
    """Whether a tool said it: not to be trained on."""
    logprobs: list[float] = field(default_factory=list)
    """In the distribution that it was drawn from; 0 where it is forced."""
    versions: list[int] = field(default_factory=list)
    """The policy that said it: the number of updates before."""
    finish_reason: FinishReason = "length"
    text: str = ""
    """What the reward is for: calls of the calculator and their results are not in it."""
    shown: str = ""
    """All of it, for a person."""
    reward: float = 0.0

    @property
    def is_truncated(self) -> bool:
        """Whether it was cut off."""
        return self.finish_reason == "length"


@dataclass
class Group:
    """The samples of one prompt."""

    id: int
    """Groups are numbered in the order in which they are trained on."""
    problem: int
    """Place of the prompt in its task."""
    question: str
    prompt: tuple[int, ...]
    version: int
    """The oldest policy that any of it is from."""
    samples: list[Sample] = field(default_factory=list)
    sampled_s: float = 0.0
    """From the first token to the last."""

    @property
    def rewards(self) -> list[float]:
        """The rewards of the samples."""
        return [sample.reward for sample in self.samples]


def problem_of(group: int, problems: int, seed: int) -> int:
    """Return the place of a group's prompt in its task: every problem once, in an order by seed and epoch."""
    epoch, place = divmod(group, problems)
    return _order(problems, seed, epoch)[place]


@functools.lru_cache(maxsize=2)
def _order(problems: int, seed: int, epoch: int) -> list[int]:
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch, problems])).random_raw(problems)
    return np.argsort(raw, kind="stable").tolist()


def ends_of(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a completion."""
    return frozenset({tokenizer.special("<|assistant_end|>"), tokenizer.bos})


def with_reward(task: Task, name: str | None, folder: str, most_s: float = math.inf) -> Task:
    """Return the task, judged by the function MODULE:NAME if there is one; `folder` is searched for the module, too.

    Raises: ConfigError if there is no such function. The task's reward raises one for whatever is wrong with the
    function, also if it takes longer than `most_s`.
    """
    if name is None:
        return task
    if folder not in sys.path:
        sys.path.append(folder)
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as err:  # a module may raise whatever it likes
        where = getattr(sys.modules.get(module), "__file__", None)
        raise ConfigError(
            f"reward={name}: cannot be imported{f' from {where}' if where else ''} ({type(err).__name__}: "
            f"{excerpt(err)}). Name MODULE:FUNCTION of a file in the working folder."
        ) from err
    if not callable(found) or not _takes_two(found):
        raise ConfigError(f"reward={name}: is no function of two. Name one that takes a conversation and a reply.")
    task.reward = functools.partial(_judge, found, name, most_s)  # type: ignore[method-assign]
    return task


def _takes_two(function: Callable[..., Any]) -> bool:
    with contextlib.suppress(ValueError):  # some of C cannot say
        try:
            inspect.signature(function).bind(None, "")
        except TypeError:
            return False
    return True


def _judge(function: Callable[..., Any], name: str, most_s: float, conversation: Conversation, reply: str) -> float:
    """Return what somebody's reward function says; its faults become errors that say what it was given."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def call() -> None:
        try:
            outcome.append((function(conversation, reply), None))
        except BaseException as err:  # it may raise whatever it likes; carried to the caller's thread
            outcome.append((None, err))

    thread = threading.Thread(target=call, name="reward", daemon=True)
    thread.start()
    thread.join(min(most_s, threading.TIMEOUT_MAX))
    about = f"for the reply {excerpt(repr(reply))}. Mend the function."
    if not outcome:
        raise ConfigError(f"reward={name}: has not returned for {most_s:g} s {about}")
    ((value, err),) = outcome
    if err is not None:
        frame = traceback.extract_tb(err.__traceback__)[-1]
        raised = f"{type(err).__name__}: {excerpt(err)} ({frame.filename}:{frame.lineno})"
        raise ConfigError(f"reward={name}: raised {raised} {about}") from err
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"reward={name}: returned {excerpt(repr(value))}, which is no finite number, {about}")
    return number


def packed_weights(model: GPT) -> bytes:
    """Return a model's weights in its compute dtype, as `GroupSampler.load` takes them."""
    return safetensors.torch.save(
        {name: p.detach().to("cpu", model.compute_dtype).contiguous() for name, p in model.named_parameters()}
    )


class GroupSampler:
    """Samples groups with the engine: `load` weights, `add` groups, then `step` until they come back."""

    def __init__(
        self, config: RLConfig, tokenizer: Tokenizer, task: Task, model: ModelConfig, *, dtype: torch.dtype,
        device: torch.device, running: int, backend: EngineName = "native",
    ) -> None:  # fmt: skip
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self.model, self.dtype, self.device, self.running, self.backend = model, dtype, device, running, backend
        self.version = -1
        """The policy's; -1 before there is one."""
        self.ends = ends_of(tokenizer)
        self._engine: InferenceEngine | None = None
        self._loop: ToolLoop | None = None
        self._groups: dict[int, _Unfinished] = {}
        self._places: dict[int, tuple[int, int]] = {}
        """By the loop's id: group and place in it."""
        self._finished: list[Group] = []

    def load(self, version: int, weights: bytes) -> None:
        """Go on with a policy's weights; what was cached of the one before is forgotten."""
        tensors = safetensors.torch.load(weights)
        self.version = version
        if self._engine is not None:
            self._engine.load_weights(tensors)
            return
        self._engine = self._with(tensors)
        self._loop = ToolLoop(self._engine, self.tokenizer)

    def _with(self, tensors: dict[str, torch.Tensor]) -> InferenceEngine:
        if self.backend == "vllm":
            return VllmEngine(
                self.model, tensors, dtype=self.dtype, device=self.device, max_running=self.running,
                compiled=self.device.type == "cuda",
            )  # fmt: skip
        with torch.device("meta"):  # nothing is drawn
            model = GPT(self.model, self.dtype)
        model.load_state_dict(tensors, assign=True)
        return Engine(model.to(self.device, self.dtype).prepare_for_inference(), max_running=self.running)

    def add(self, group: int) -> None:
        """Begin to sample a group; a prompt that leaves no room gets empty samples."""
        assert self._loop is not None, "weights come first"
        config = self.config
        problem = problem_of(group, len(self.task), config.seed)
        conversation = self.task[problem]
        prompt = tuple(render_prompt(self.tokenizer, conversation))
        samples = [Sample() for _ in range(config.samples_per_group)]
        begun = Group(group, problem, conversation.messages[-2].text, prompt, self.version, samples)
        room = min(config.max_new_tokens, self.model.sequence_len - len(prompt))
        self._groups[group] = _Unfinished(begun, conversation, len(samples) if room > 0 else 0)
        if room <= 0:
            self._finish(group)
            return
        for place in range(len(samples)):
            request = Request(
                prompt=prompt, max_new_tokens=room, stop_tokens=self.ends,
                temperature=config.temperature, seed=(config.seed << 64) + (group << 16) + place,
            )  # fmt: skip
            self._places[self._loop.add(request)] = (group, place)

    def step(self) -> list[Group]:
        """Work for a moment and return the groups that are done."""
        if self._loop is not None and self._places:
            for event in self._loop.step():
                self._take(event)
        finished, self._finished = self._finished, []
        return finished

    def _take(self, event: Event) -> None:
        group, place = self._places[event.id]
        sample = self._groups[group].group.samples[place]
        sample.tokens.append(event.token)
        sample.is_forced.append(event.is_forced)
        sample.logprobs.append(event.logprob)
        sample.versions.append(self.version)
        if event.finish_reason is not None:
            sample.finish_reason = event.finish_reason
            del self._places[event.id]
            self._groups[group].left -= 1
            if not self._groups[group].left:
                self._finish(group)

    def _finish(self, number: int) -> None:
        """Judge a group's samples."""
        unfinished = self._groups.pop(number)
        group = unfinished.group
        for sample in group.samples:
            parts = parse_parts(self.tokenizer, sample.tokens)
            sample.text = "".join(part.text for part in parts if part.kind == "text")
            sample.shown = shown(parts)
            sample.reward = self.task.reward(unfinished.conversation, sample.text)
        said = [sample.versions[0] for sample in group.samples if sample.versions]
        group.version = min(said, default=group.version)
        group.sampled_s = time.monotonic() - unfinished.start_s
        self._finished.append(group)


@dataclass
class _Unfinished:
    group: Group
    conversation: Conversation
    left: int
    """Samples that have not ended."""
    start_s: float = field(default_factory=time.monotonic)
