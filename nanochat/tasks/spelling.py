"""Words to their letters: spell a word, or count a letter in it by spelling, counting and a check with the calculator.

A model reads pieces of words and never sees their letters; it has to learn what each piece is made of. Half of the
words are common ones, half are made of syllables. A hash of the word says whether it is in train, val or test.

Source: SpellingBee of karpathy/nanochat tasks/spellingbee.py@92d63d4, whose words are a downloaded list.
Not covered: capitals, letters with accents, words of more than MAX_LETTERS letters.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

from nanochat.data.conversations import Conversation, Part, exchange
from nanochat.tasks.arithmetic import Draws, GeneratedTask, wording
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.task import Task

MAX_LETTERS = 12


class Spelling(GeneratedTask):
    """Spelling and counting letters, half of each; facts["number"] is the count."""

    name = "spelling"
    sizes: ClassVar[Mapping[str, int]] = {"train": 2_000, "val": 200, "test": 500}

    def conversation(self, index: int) -> Conversation:
        """Return a question and its answer."""
        draws, texts = self.draws(index), wording(self.name)
        word = _draw_word(draws, texts)
        while group_of(word) != self.split:
            word = _draw_word(draws, texts)
        if draws.chance(0.5):
            return exchange(draws.choice(texts["spell"]).format(word=word), " ".join(word))
        letter = draws.choice(word if draws.chance(0.8) else "abcdefghijklmnopqrstuvwxyz")
        count = str(word.count(letter))
        spelled = [
            f"{char}{word[: place + 1].count(char)}" if char == letter else char for place, char in enumerate(word)
        ]
        parts = (
            Part("text", f"{' '.join(spelled)}. Check:"),
            Part("python", f'"{word}".count("{letter}")'),
            Part("python_output", count),
            Part("text", f" {count}\n#### {count}"),
        )
        return exchange(draws.choice(texts["count"]).format(word=word, letter=letter), parts, number=count)

    @staticmethod
    def reward(conversation: Conversation, reply: str) -> float:
        """Return 1 if the letters are exactly the word's, or the last `####` number is the count, else 0."""
        return (GSM8K if "number" in conversation.facts else Task).reward(conversation, reply)


def group_of(word: str) -> str:
    """Return the split that a word belongs to: a fifth of all are test's, a tenth val's."""
    tenth = hashlib.sha256(word.encode()).digest()[0] % 10
    return {0: "test", 5: "test", 1: "val"}.get(tenth, "train")


def _draw_word(draws: Draws, texts: Mapping[str, Any]) -> str:
    """Return a common word, or one to three syllables."""
    if draws.chance(0.5):
        return draws.choice(texts["words"].split())
    word = ""
    for _ in range(draws.between(1, 3)):
        word += draws.choice(texts["onsets"].split()) + draws.choice(texts["vowels"].split())
        word += draws.choice(texts["codas"].split()) if draws.chance(0.8) else ""
    return word[:MAX_LETTERS]
