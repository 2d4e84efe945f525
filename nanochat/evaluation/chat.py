"""Problems to verdicts: a model replies and the task judges the text, or it chooses among the answer letters."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanochat.data.conversations import Conversation, Part, parse_parts, render_prompt
from nanochat.data.tokenizer import Tokenizer
from nanochat.evaluation.scoring import GPTScorer, Option
from nanochat.inference.completions import Completion, complete
from nanochat.inference.engine import Engine
from nanochat.inference.requests import Request
from nanochat.inference.tool_loop import ToolLoop
from nanochat.model.gpt import GPT
from nanochat.tasks.task import Task

MAX_NEW_TOKENS = 256
SLOTS = 32


@dataclass(frozen=True)
class Reply:
    """What a model said."""

    text: str
    """Its text alone, which tasks judge."""
    shown: str
    """All of it, calls of the calculator as [call = result]."""


@dataclass(frozen=True)
class Verdict:
    """One problem, one reply, and whether it is right."""

    index: int
    question: str
    expected: str
    reply: str
    is_right: bool


def answer(
    model: GPT,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
) -> list[Reply]:
    """Reply to the last user message of each conversation, with the calculator, all in one batch.

    A reply ends where the row that the model was trained for does; a prompt that leaves no room gets an empty one.
    """
    room = model.config.sequence_len
    prompts = [tuple(render_prompt(tokenizer, conversation)) for conversation in conversations]
    ends = frozenset({tokenizer.special("<|assistant_end|>"), tokenizer.bos})
    requests = {
        number: Request(
            prompt=prompt, max_new_tokens=min(max_new_tokens, room - len(prompt)), stop_tokens=ends,
            temperature=temperature, seed=seeds[number] if seeds else 0,
        )
        for number, prompt in enumerate(prompts)
        if len(prompt) < room
    }  # fmt: skip
    if not requests:
        return [Reply("", "") for _ in conversations]
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests.values())
    engine = Engine(model, max_running=min(SLOTS, len(requests)), longest=longest)
    completions = dict(zip(requests, complete(ToolLoop(engine, tokenizer), requests.values()), strict=True))
    return [read_reply(tokenizer, completions.get(number)) for number in range(len(prompts))]


def read_reply(tokenizer: Tokenizer, completion: Completion | None) -> Reply:
    """Return a completion as text; none is an empty reply."""
    if completion is None:
        return Reply("", "")
    parts = parse_parts(tokenizer, completion.tokens)
    text = "".join(part.text for part in parts if part.kind == "text")
    return Reply(text, shown(parts))


def shown(parts: Iterable[Part]) -> str:
    """Return parts for a person: calls of the calculator as [call = result]."""
    around = {"text": ("", ""), "python": ("[", " = "), "python_output": ("", "]")}
    return "".join(around[part.kind][0] + part.text + around[part.kind][1] for part in parts)


def judge(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    indices: Sequence[int],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> list[Verdict]:
    """Return the verdicts on a task's problems, `samples` after each other for each.

    Every reply draws from a seed of its own (seed, problem, sample), so it does not depend on the company.
    """
    conversations = [task[index] for index in indices]
    if task.kind == "choose":
        return _choose(GPTScorer(model, tokenizer, batch_tokens), tokenizer, indices, conversations)
    repeated = [(index, sample) for index in indices for sample in range(samples)]
    asked = [conversation for conversation in conversations for _ in range(samples)]
    seeds = [(seed * 1_000_003 + index) * 1_000 + sample for index, sample in repeated]
    replies = answer(model, tokenizer, asked, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)
    return [
        Verdict(
            index, conversation.messages[-2].text, shown(conversation.messages[-1].parts), reply.shown,
            task.evaluate(conversation, reply.text),
        )
        for (index, _), conversation, reply in zip(repeated, asked, replies, strict=True)
    ]  # fmt: skip


def _choose(
    scorer: GPTScorer, tokenizer: Tokenizer, indices: Sequence[int], conversations: Sequence[Conversation]
) -> list[Verdict]:
    """Take the likeliest of the answer letters as the first token of the reply."""
    groups = []
    for conversation in conversations:
        prompt = tuple(render_prompt(tokenizer, conversation))
        letters = conversation.facts["letters"]
        groups.append([Option((*prompt, *tokenizer.encode_ordinary(letter)), len(prompt)) for letter in letters])
    verdicts = []
    for index, conversation, scores in zip(indices, conversations, scorer.score(groups), strict=True):
        letters, expected = conversation.facts["letters"], conversation.facts["answer"]
        nats = [score.mean_nats for score in scores]
        chosen = letters[nats.index(min(nats))]
        question = conversation.messages[-2].text
        verdicts.append(Verdict(index, question, expected, chosen, chosen == expected))
    return verdicts
