"""Mixtures: how often what is in them, what stays out of them, and the rows they become."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.config.sft import SftConfig
from nanochat.data.conversations import Conversation, as_messages, exchange, render
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.errors import ConfigError, DataError
from nanochat.run_context import RunContext
from nanochat.storage import read_json
from nanochat.tasks import mixture_shards
from nanochat.tasks.mixture import Mixture, MixturePart, MixtureSource, load_mixture, parse_part, with_absolute_paths
from nanochat.tasks.mixture_shards import write_mixture_shards
from nanochat.tasks.registry import LOADERS, load_task
from nanochat.tasks.task import Task, TaskFiles

TOKENIZER = Tokenizer([], SPLIT_PATTERNS["nanochat"])


class Numbers(Task):
    """Conversations that say a task's name and their number."""

    def __init__(self, name: str, size: int, split: str = "train") -> None:
        self.name, self.size, self.split = name, size, split

    def __len__(self) -> int:
        return self.size

    def conversation(self, index: int):
        return exchange(f"{self.name} {index}", "yes")


def source(*mixture: str, **changes) -> MixtureSource:
    return MixtureSource(SftConfig(mixture=mixture, **changes), "nowhere")


def mixed(*sizes_and_parts: tuple[int, str], **changes) -> Mixture:
    tasks = [(Numbers(parse_part(part).task, size), None) for size, part in sizes_and_parts]
    return Mixture(source(*[part for _, part in sizes_and_parts], **changes), tasks)


def questions(conversations) -> list[str]:
    return [conversation.messages[0].text for conversation in conversations]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gsm8k", MixturePart(task="gsm8k")),
        ("gsm8k*4", MixturePart(task="gsm8k", epochs=4)),
        ("smoltalk~0.5", MixturePart(task="smoltalk", share=0.5)),
        ("messages=my/file*.jsonl*0.5", MixturePart(task="messages", path="my/file*.jsonl", epochs=0.5)),
        ("gsm8k=/data/g~0.25", MixturePart(task="gsm8k", path="/data/g", share=0.25)),
    ],
)
def test_a_part_is_read(text, expected):
    assert parse_part(text) == expected


@pytest.mark.parametrize("text", ["", "gsm8k*0", "gsm8k*x", "gsm8k~1", "gsm8k~0", "gsm8k*1.2.3", "a b"])
def test_a_part_that_makes_no_sense_is_refused(text):
    with pytest.raises(ConfigError, match="mixture="):
        parse_part(text)


def test_the_character_of_ones_own_reaches_the_identity_task_alone():
    assert parse_part("identity", "me.toml").path == "me.toml"
    assert parse_part("identity=you.toml", "me.toml").path == "you.toml"
    assert parse_part("arithmetic", "me.toml").path is None


def test_epochs_and_shares_give_the_counts_they_say():
    mixture = mixed((101, "a*3"), (41, "b*0.5"),
                    (21, "c~0.5"))  # fmt: skip
    # 96, 39 and 20 are left after a twentieth of each is held out; c is as many as a and b together.
    assert mixture.counts() == {"a": 288, "b": 20, "c": 308}
    seen = Counter(questions(mixture))
    assert {seen[question] for question in seen if question.startswith("a ")} == {3}
    assert max(seen[question] for question in seen if question.startswith("b ")) == 1
    assert {seen[question] for question in seen if question.startswith("c ")} <= {15, 16}


def test_what_is_held_out_is_never_trained_on_however_often_it_is_repeated():
    mixture = mixed((200, "a*5"), (60, "b"))
    held_out = questions(mixture.validation())
    assert len(held_out) == len(set(held_out)) == 10 + 3
    assert not set(held_out) & set(questions(mixture))
    assert set(held_out) | set(questions(mixture)) == {f"a {n}" for n in range(200)} | {f"b {n}" for n in range(60)}
    few = mixed((200, "a"), validation_conversations=4)
    assert len(few.validation()) == 4


@given(st.integers(0, 5), st.lists(st.tuples(st.integers(2, 60), st.sampled_from([0.5, 1, 2])), min_size=1, max_size=3))
def test_the_order_is_a_shuffle_that_follows_from_the_seed(seed, sizes):
    parts = [(size, f"t{number}*{epochs}") for number, (size, epochs) in enumerate(sizes)]
    first, again, other = (mixed(*parts, seed=s) for s in (seed, seed, seed + 1))
    assert questions(first) == questions(again)
    assert sorted(Counter(first.counts())) == sorted(Counter(other.counts()))
    if len(first) > 30:
        assert questions(first) != questions(other)


@pytest.mark.parametrize("joined", [0.0, 0.25, 1.0])
def test_a_share_goes_on_with_another_conversation_of_the_mixture(joined):
    tasks = ((1000, "a"), (1000, "b"))
    mixture, again = mixed(*tasks, joined=joined), mixed(*tasks, joined=joined)
    whole = [mixture.joined(index) for index in range(len(mixture))]
    turns = [len(conversation.messages) // 2 for conversation in whole]
    assert turns.count(2) == pytest.approx(joined * len(mixture), abs=100 if 0 < joined < 1 else 0)
    assert questions(whole) == questions(mixture) == questions(mixed(*tasks)), "the first of them stays"
    seconds = [conversation.messages[2].text for conversation in whole if len(conversation.messages) > 2]
    assert not set(questions(mixture.validation())) & set(seconds)
    if seconds:
        assert 0.35 < sum(second.startswith("a") for second in seconds) / len(seconds) < 0.65
        assert len(set(seconds)) > 0.5 * len(seconds)
    assert whole == [again.joined(index) for index in range(len(again))]


def test_a_pair_that_does_not_fit_a_row_leaves_the_first_alone(tmp_path):
    lines = [turn(f"q{number}", "y" * (10 + number % 50)) for number in range(100)]
    mixture_source = write(tmp_path / "c.jsonl", lines, joined=1.0)
    shards = write_mixture_shards(mixture_source, RunContext(), TOKENIZER, 80, str(tmp_path / "shards"))
    assert sum(shard.documents for shard in shards.split("train")) == 95
    assert sum(shard.skipped["longer_than_a_row"] for shard in shards.shards) == 0
    starts = (rows_of(shards, "train") == TOKENIZER.special("<|user_start|>")).sum()
    assert 95 + 10 < starts < 2 * 95, "some pairs fit, some do not"


class Repeating(Numbers):
    """Asks ten questions again and again."""

    def conversation(self, index: int):
        return exchange(f"{self.name} {index % 10}", f"yes {index}")


def test_a_question_that_is_held_out_is_asked_nowhere_else():
    mixture = Mixture(source("a", validation_conversations=3), [(Repeating("a", 200), None)])
    held_out = set(questions(mixture.validation()))
    assert 1 <= len(held_out) <= 3
    assert not held_out & set(questions(mixture))
    assert len(set(questions(mixture))) == 10 - len(held_out)
    with pytest.raises(ConfigError, match="asks nothing but what is held out"):
        Mixture(source("a"), [(SameQuestion("a", 40), None)])


class SameQuestion(Numbers):
    """Asks one question."""

    def conversation(self, index: int):
        return exchange("the same", f"{index}")


class Chats(Numbers):
    """Chats that all begin alike and end with thanks; every second is there twice."""

    kind = "unscored"

    def conversation(self, index: int):
        turns = [
            exchange("Write a poem.", f"poem {index // 2 * 2 if index % 4 == 0 else index}"),
            exchange("Thanks!", "!"),
        ]
        return Conversation(turns[0].messages + turns[1].messages)


def test_of_chats_just_copies_of_what_is_held_out_stay_out():
    mixture = Mixture(source("c", validation_conversations=20), [(Chats("c", 400), None)])
    assert len(mixture) > 350, "how a chat begins or ends does not keep it out"
    assert mixture.left_out == 400 - 20 - len(mixture)
    said = [[message.text for message in one.messages] for one in mixture]
    assert not any([message.text for message in one.messages] in said for one in mixture.validation())


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = SftConfig(mixture=("arithmetic*2", "messages=a/b.jsonl*0.5", "gsm8k=/x~0.1"), identity="me.toml")
    found = with_absolute_paths(config)
    assert found.mixture == ("arithmetic*2", f"messages={tmp_path}/a/b.jsonl*0.5", "gsm8k=/x~0.1")
    assert found.identity == f"{tmp_path}/me.toml"
    assert with_absolute_paths(found) == found


def test_tasks_are_spread_through_the_whole():
    mixture = mixed((500, "a"), (500, "b"))
    half = [question[0] for question in questions(mixture)[: len(mixture) // 2]]
    assert 180 < half.count("a") < 300


@pytest.mark.parametrize("split", ["val", "test", "test_templates", "two_step", "two_step_test", "validation"])
def test_only_training_splits_are_mixed(split):
    with pytest.raises(ConfigError, match=f"its {split} split is for scores. Train on a train split"):
        Mixture(source("a"), [(Numbers("a", 30, split), None)])
    if split != "val":
        with pytest.raises(ConfigError, match=f"its {split} split is for scores"):
            Mixture(source("a"), [(Numbers("a", 30), Numbers("a", 30, split))])


def test_a_val_split_is_what_is_held_out_and_train_stays_whole():
    """But for the questions that both ask."""
    train, val = Numbers("a", 40), Numbers("a", 60, "val")
    mixture = Mixture(source("a", validation_conversations=7), [(train, val)])
    held_out = questions(mixture.validation())
    assert mixture.held_out[0].split == "val"
    assert len(held_out) == 7
    assert set(questions(mixture)) == {f"a {number}" for number in range(40)} - set(held_out)


class TwoTurns(Numbers):
    """Asks about its number and the next one."""

    def conversation(self, index: int):
        both = [exchange(f"{self.name} {number}", "yes").messages for number in (index, index + 1)]
        return Conversation(both[0] + both[1])


def test_what_is_held_out_is_asked_in_no_turn():
    mixture = Mixture(source("a", validation_conversations=3), [(TwoTurns("a", 200), None)])

    def asked(conversations):
        return {message.text for one in conversations for message in one.messages if message.role == "user"}

    assert len(asked(mixture.validation())) >= 4
    assert not asked(mixture.validation()) & asked(mixture)
    assert len(mixture) >= 200 - 3 * 3


def test_every_task_of_the_registry_is_asked_for_its_training_split(monkeypatch):
    """Whatever a mixture names, what is loaded is `train`: there is no way to name another."""
    asked = []

    def loader(name):
        def load(split, files):
            asked.append((name, split))
            return Numbers(f"{name} {split}", 40, split)

        return load

    for name in list(LOADERS):
        monkeypatch.setitem(LOADERS, name, loader(name))
    config = SftConfig(mixture=tuple(f"{name}=/somewhere" for name in LOADERS))
    mixture = load_mixture.__wrapped__(MixtureSource(config, "x"))
    assert asked == [(name, split) for name in LOADERS for split in ("train", "val")]
    assert {task.split for task in mixture.tasks} == {"train"}
    assert {task.split for task in mixture.held_out} == {"val"}


@pytest.mark.parametrize("name", ["arithmetic", "identity", "spelling"])
def test_test_questions_of_the_embedded_tasks_are_not_in_the_mixture(name):
    trained = set(questions(load_mixture(MixtureSource(SftConfig(mixture=(name,)), "x"))))
    tested = set(questions(load_task(name, "test", TaskFiles(folder="x"))))
    assert len(tested) > 40
    assert not trained & tested


@pytest.mark.parametrize(("name", "folder"), [("gsm8k", "gsm8k"), ("mmlu", "mmlu")])
def test_test_questions_of_real_data_are_in_no_other_split(name, folder, test_data):
    files = TaskFiles(folder="x", path=str(test_data / folder))
    tested = {question.strip() for question in questions(load_task(name, "test", files))}
    other = "train" if name == "gsm8k" else "val"
    others = {question.strip() for question in questions(load_task(name, other, files))}
    assert len(tested) > 1000
    assert len(tested & others) <= (0 if name == "gsm8k" else 5), "a few MMLU questions are published twice"


def test_shares_without_a_size_and_unknown_tasks_are_refused():
    with pytest.raises(ConfigError, match="Leave room below 1"):
        _ = MixtureSource(SftConfig(mixture=("smoltalk~0.6", "gsm8k~0.5")), "x").parts
    with pytest.raises(ConfigError, match=r"task=gsm8: must be one of .* Did you mean gsm8k\?"):
        load_mixture(MixtureSource(SftConfig(mixture=("gsm8",)), "x"))


def test_files_of_ones_own_are_known(tmp_path):
    (tmp_path / "folder" / "below").mkdir(parents=True)
    for name in ("c.jsonl", "me.toml", "folder/train.jsonl", "folder/below/x.csv"):
        (tmp_path / name).write_text("x")
    mixture = ("arithmetic", "identity", f"messages={tmp_path}/c.jsonl*2", f"gsm8k={tmp_path}/folder", "spelling=gone")
    config = SftConfig(mixture=mixture, identity=f"{tmp_path}/me.toml")
    found = MixtureSource(config, "x").files()
    assert found == [
        f"{tmp_path}/{name}" for name in ("me.toml", "c.jsonl", "folder/below/x.csv", "folder/train.jsonl")
    ]


# --- rows


def write(path, conversations, **changes) -> MixtureSource:
    path.write_text("".join(json.dumps(conversation) + "\n" for conversation in conversations))
    return source(f"messages={path}", **changes)


def turn(question: str, answer: str) -> dict:
    return as_messages(exchange(question, answer))


def rows_of(shards, split) -> np.ndarray:
    return np.concatenate([shards.read_rows(shard, group) for shard in shards.split(split) if shard.rows
                           for group in range(len(shard.group_sizes()))])  # fmt: skip


def test_every_conversation_stands_whole_in_one_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr(mixture_shards, "PART_CONVERSATIONS", 32)
    lines = [turn(f"q{number}" + "x" * (number * 7 % 50), "y" * (1 + number * 11 % 40)) for number in range(100)]
    mixture_source = write(tmp_path / "c.jsonl", [*lines, turn("long", "z" * 200)])
    shards = write_mixture_shards(mixture_source, RunContext(), TOKENIZER, 127, str(tmp_path / "shards"))
    mixture = load_mixture(mixture_source)
    expected = {"train": list(mixture), "validation": mixture.validation()}
    for split, conversations in expected.items():
        rows = rows_of(shards, split)
        assert (rows[:, 0] == TOKENIZER.bos).all()
        found = Counter()
        for row in rows.tolist():
            starts = [place for place, token in enumerate(row) if token == TOKENIZER.bos] + [len(row)]
            found.update(tuple(row[a:b]) for a, b in itertools.pairwise(starts) if b - a > 1)
        rendered = [tuple(render(TOKENIZER, conversation)) for conversation in conversations]
        assert found == Counter(ids for ids in rendered if len(ids) <= 128)
    assert sum(shard.skipped["longer_than_a_row"] for shard in shards.shards) == 1
    assert len(shards.split("train")) == 3
    filled = (rows_of(shards, "train") != TOKENIZER.bos).mean()
    assert filled > 0.85, "best fit leaves little padding"


def test_a_second_call_packs_only_what_changed(tmp_path):
    lines = [turn(f"q{number}", "yes") for number in range(60)]
    mixture_source = write(tmp_path / "c.jsonl", lines)
    folder = tmp_path / "shards"
    first = write_mixture_shards(mixture_source, RunContext(), TOKENIZER, 63, str(folder))
    (record,) = (folder / "train").glob("*.json")
    written = record.stat().st_mtime_ns
    assert write_mixture_shards(mixture_source, RunContext(), TOKENIZER, 63, str(folder)) == first
    assert record.stat().st_mtime_ns == written
    load_mixture.cache_clear()
    changed = write(tmp_path / "c.jsonl", [*lines[:-1], turn("other", "no")])
    second = write_mixture_shards(changed, RunContext(), TOKENIZER, 63, str(folder))
    assert second.manifest_hash != first.manifest_hash
    assert read_json(str(record))["shard"]["sha256"] in {shard.sha256 for shard in second.shards}


def test_malformed_conversations_end_the_work_or_are_counted(tmp_path):
    lines = [*[turn(f"q{number}", "yes") for number in range(40)], {"messages": []}]
    mixture_source = write(tmp_path / "bad.jsonl", lines)
    with pytest.raises(DataError, match=r"bad\.jsonl:41: messages=\[\]"):
        load_mixture(mixture_source)
    dropping = source(*mixture_source.config.mixture, malformed="drop")
    mixture = load_mixture(dropping)
    assert len(mixture) + len(mixture.validation()) == 40
    assert sum(mixture.dropped().values()) == 1


def test_conversations_that_are_all_too_long_are_an_error_not_an_endless_packer(tmp_path):
    mixture_source = write(tmp_path / "c.jsonl", [turn(f"q{number}", "z" * 200) for number in range(30)])
    with pytest.raises(DataError, match="no train conversation is at most 63 tokens long"):
        write_mixture_shards(mixture_source, RunContext(), TOKENIZER, 63, str(tmp_path / "shards"))
