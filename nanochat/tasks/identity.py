"""A character in a TOML file to conversations in which the model says who it is, with some small talk between them.

Each intent is asked for in many phrasings. Those of val and test are held out: training never has them, only their key
words, for the same intent. So it is scored whether the model knows itself, not whether it knows the question.
A model that always gives the best of its answers, name and kind, is right in two of three: that is the task's chance.

Source of the idea: karpathy/nanochat dev/gen_synthetic_data.py, which lets a large model write the conversations.
Not covered: a tone for other answers, facts that are asked for one by one.
"""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from nanochat import storage
from nanochat.data.conversations import Conversation, exchange
from nanochat.errors import ConfigError, excerpt
from nanochat.tasks.arithmetic import Draws, GeneratedTask, wording

DEFAULT_CHARACTER = str(Path(__file__).with_name("identity.toml"))
MAX_CHARS = 200
"""Of each text of a character, so that its conversations fit into a row."""
SMALL_TALK_SHARE = 0.3
TWO_TURNS_SHARE = 0.25
TONE_SHARE = 0.3
CARELESS_SHARE = 0.2
"""Questions in lower case that end without a mark."""


@dataclass(frozen=True, kw_only=True)
class Character:
    """Who the model is, as it stands in the TOML file."""

    name: str
    maker: str
    kind: str = "a small language model"
    abilities: str = "chat and use a calculator"
    facts: tuple[str, ...] = ()
    tone: tuple[str, ...] = ()


@dataclass(frozen=True)
class Intent:
    """What a question wants: an intent of wording.toml."""

    needs: str
    """What every right answer contains."""
    answers: list[str]
    asked: list[str]
    """The phrasings of training; but for small talk the last one is val's."""
    held_out: list[str] = field(default_factory=list)
    """Those of test; small talk has none."""

    def phrasings(self, split: str) -> list[str]:
        """Return the phrasings of a split."""
        of_train = self.asked[:-1] if self.held_out else self.asked
        return {"train": of_train, "val": self.asked[len(of_train) :], "test": self.held_out}[split]


class IdentityTask(GeneratedTask):
    """Questions about the model itself, in one turn or two; facts["must_contain"] is what the last reply needs."""

    name = "identity"
    sizes: ClassVar[Mapping[str, int]] = {"train": 1_500, "val": 48, "test": 168}

    def __init__(self, split: str, character: Character) -> None:
        super().__init__(split)
        self.character = character
        self.intents = [Intent(**intent) for intent in wording(self.name)["intents"]]
        self.greetings: list[str] = wording(self.name)["greetings"]
        if split == "test":
            asked = [self.conversation(index) for index in range(len(self))]
            replies = {conversation.messages[-1].text for conversation in asked}
            self.chance = max(sum(self.reward(one, reply) for one in asked) for reply in replies) / len(asked)

    def conversation(self, index: int) -> Conversation:
        """Return a conversation; val and test put every phrasing plainly first, then with greetings."""
        draws = self.draws(index)
        if self.split != "train":
            held_out = [(intent, phrasing) for intent in self.intents for phrasing in intent.phrasings(self.split)]
            greeting = draws.choice(self.greetings) if index >= len(held_out) else ""
            intent, phrasing = held_out[index % len(held_out)]
            return self._exchange(draws, intent, _written(greeting, phrasing))
        before = self._trained(draws).messages if draws.chance(TWO_TURNS_SHARE) else ()
        last = self._trained(draws)
        return Conversation(before + last.messages, last.facts)

    @staticmethod
    def reward(conversation: Conversation, reply: str) -> float:
        """Return 1 if the reply contains what the intent needs, in whole words, whatever the case, else 0."""
        needed = re.escape(conversation.facts["must_contain"])
        return float(re.search(rf"(?<!\w){needed}(?!\w)", reply, re.IGNORECASE) is not None)

    def _trained(self, draws: Draws) -> Conversation:
        """Return one question of training and its answer."""
        is_small_talk = draws.chance(SMALL_TALK_SHARE)
        intent = draws.choice([intent for intent in self.intents if bool(intent.held_out) != is_small_talk])
        greeting = "" if is_small_talk or draws.chance(0.5) else draws.choice(self.greetings)
        question = _written(greeting, draws.choice(intent.phrasings("train")))
        if draws.chance(CARELESS_SHARE):
            question = question.lower().rstrip("?.!")
        return self._exchange(draws, intent, question)

    def _exchange(self, draws: Draws, intent: Intent, question: str) -> Conversation:
        words = dataclasses.asdict(self.character)
        words["fact"] = draws.choice(self.character.facts or (f"I am {self.character.kind}.",))
        answer = draws.choice(intent.answers).format(**words)
        if intent.held_out and self.character.tone and draws.chance(TONE_SHARE):
            answer += f" {draws.choice(self.character.tone)}"
        return exchange(question, answer, must_contain=intent.needs.format(**words))


def load_identity(split: str, path: str | None = None) -> IdentityTask:
    """Return a split of the conversations about a character; without `path` it is nanochat's own.

    Raises: ConfigError naming the splits there are if it is none of them, or as `read_character`.
    """
    return IdentityTask(split, read_character(path or DEFAULT_CHARACTER))


def read_character(path: str) -> Character:
    """Read a character from a TOML file. Raises: ConfigError naming file, field and the rule that it breaks."""
    try:
        with storage.open_read(path) as file:
            content = tomllib.loads(file.read().decode())
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(
            f"identity={path}: cannot be read as TOML ({excerpt(err)}). Begin with a copy of {DEFAULT_CHARACTER}."
        ) from err
    known = [one.name for one in dataclasses.fields(Character)]
    for key, value in content.items():
        if key not in known:
            raise ConfigError(f"identity={path}: {excerpt(key)}: must be one of {', '.join(known)}. Rename or drop it.")
        is_list = key in ("facts", "tone")
        texts = value if isinstance(value, list) else [value]
        if isinstance(value, list) != is_list or not all(map(_is_line, texts)):
            raise ConfigError(
                f"identity={path}: {key}={excerpt(value)}: must be {'a list of texts' if is_list else 'a text'}, one "
                f"line of 1 to {MAX_CHARS} characters{' each' if is_list else ''}. Mend it."
            )
        content[key] = tuple(value) if is_list else value
    for key in ("name", "maker"):
        if key not in content:
            raise ConfigError(f'identity={path}: {key}: is missing. Add a line {key} = "...".')
    return Character(**content)


def _is_line(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip()) and text.isprintable() and len(text) <= MAX_CHARS


def _written(greeting: str, phrasing: str) -> str:
    """Return a question as one writes it, after a greeting."""
    begun = phrasing if greeting.endswith(", ") else phrasing[0].upper() + phrasing[1:]
    return greeting + begun + ("" if phrasing[-1] in ".!" else "?")
