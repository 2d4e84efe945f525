"""A chat in the terminal: pieces as they come, history as the model reads it, a stop that keeps what was said."""

import importlib.util
import json
from pathlib import Path

import pytest
from test_engine import CALL, CALLED, END, OUTPUT, TOKENIZER, TOLD, Script, spelled

from nanochat.data.conversations import Part, as_messages, parse_conversation, render
from nanochat.errors import ConfigError
from nanochat.inference.chat_session import ChatSession
from nanochat.inference.requests import Event, Request
from nanochat.inference.tool_loop import ToolLoop

ROOT = Path(__file__).parents[3]


class Answers:
    """A source that says one answer after the other."""

    def __init__(self, *answers: list[int]) -> None:
        self.answers = list(answers)
        self.requests: list[Request] = []
        self.aborted: list[int] = []
        self.left: list[int] = []

    def add(self, request: Request) -> int:
        self.requests.append(request)
        self.left = self.answers.pop(0)[: request.max_new_tokens]
        return len(self.requests)

    def abort(self, id: int) -> None:
        self.aborted.append(id)

    def step(self) -> list[Event]:
        token, *self.left = self.left
        reason = "stop" if token in self.requests[-1].stop_tokens else "length" if not self.left else None
        return [Event(len(self.requests), token, reason)]


def session(*answers: list[int], capacity: int = 200, **options) -> ChatSession:
    return ChatSession(Answers(*answers), TOKENIZER, capacity, **options)


def test_the_pieces_of_an_answer_come_as_parts_whole_characters_at_a_time():
    says = [*spelled("a \u00e9"), CALL, *spelled("1+1"), CALLED, OUTPUT, *spelled("2"), TOLD, *spelled("b"), END]
    pieces = list(session(says).ask("Hi"))
    assert pieces == [
        Part("text", "a"), Part("text", " "), Part("text", "\u00e9"), *[Part("python", one) for one in "1+1"],
        Part("python_output", "2"), Part("text", "b"),
    ]  # fmt: skip


def test_the_next_question_is_read_with_all_that_was_said():
    chat = session([*spelled("yes"), END], [*spelled("no"), END])
    list(chat.ask("one?"))
    list(chat.ask("two?"))
    asked = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "yes"},
             {"role": "user", "content": "two?"}, {"role": "assistant", "content": "no"}]  # fmt: skip
    conversation = parse_conversation({"messages": asked}, "f:1")
    assert chat.ids() == render(TOKENIZER, conversation)
    assert chat.conversation() == conversation
    assert list(chat.source.requests[1].prompt) == render(TOKENIZER, conversation)[: -len("no") - 1]
    assert [request.seed for request in chat.source.requests] == [0, 1]


def test_a_stopped_answer_keeps_what_was_said_and_is_closed():
    chat = session([*spelled("abcdef"), END], [*spelled("ok"), END])
    pieces = chat.ask("one?")
    assert [next(pieces).text, next(pieces).text] == ["a", "b"]
    pieces.close()
    assert chat.source.aborted == [1]
    assert chat.turns[1] == [TOKENIZER.special("<|assistant_start|>"), *spelled("ab"), END]
    list(chat.ask("two?"))
    assert chat.conversation().messages[3].text == "ok"


def test_an_answer_cut_by_the_limit_is_closed_too():
    chat = session(spelled("x" * 50), max_new_tokens=5)
    assert "".join(part.text for part in chat.ask("?")) == "xxxxx"
    assert chat.turns[1][-1] == END
    assert len(chat.turns[1]) == 1 + 5 + 1


SHAPES = [
    [OUTPUT, *spelled("2"), TOLD, *spelled("b")],
    [CALL, *spelled("1+1"), CALLED, *spelled("b")],
    [CALL, *spelled("1+1"), CALL, *spelled("2+2"), CALLED, OUTPUT, *spelled("4"), TOLD, *spelled("b")],
    [*spelled("b"), CALL, *spelled("1+1"), CALLED, OUTPUT, *spelled("2"), TOLD, OUTPUT, *spelled("3"), TOLD],
    [*spelled(" "), CALL, *spelled("1+1"), CALLED, *spelled(" "), OUTPUT, *spelled("2"), TOLD, *spelled("b")],
    [CALL, *spelled("1+1"), CALLED],
]


@pytest.mark.parametrize("said", SHAPES)
def test_what_is_saved_is_a_conversation_whatever_the_model_said(said):
    chat = session([*said, END])
    list(chat.ask("?"))
    saved = as_messages(chat.conversation())
    if saved["messages"]:
        assert parse_conversation(saved, "f:1") == chat.conversation()
    assert ("b" in str(saved)) == (ord("b") in said)


def test_an_answer_that_was_never_begun_leaves_no_question():
    chat = session([*spelled("ok"), END], [*spelled("ok"), END])
    chat.ask("one?").close()
    assert chat.conversation().messages == ()
    list(chat.ask("two?"))
    assert [message.text for message in chat.conversation().messages] == ["two?", "ok"]


def test_draws_are_from_what_was_asked_for():
    chat = session([END], temperature=0.5, top_k=7, seed=3)
    list(chat.ask("?"))
    (asked,) = chat.source.requests
    assert (asked.temperature, asked.top_k, asked.seed) == (0.5, 7, 3)


def test_old_turns_are_forgotten_when_the_model_reads_no_more():
    chat = session(*[[*spelled("y" * 20), END]] * 5, capacity=100)
    for number in range(5):
        list(chat.ask(f"{number} " + "x" * 20))
        assert len(chat.source.requests[-1].prompt) + chat.source.requests[-1].max_new_tokens <= 100
    assert chat.forgotten > 0
    assert chat.forgotten % 2 == 0
    assert chat.conversation().messages[-2].text.startswith("4 ")
    assert len(chat.turns) + chat.forgotten == 10


@pytest.mark.parametrize(
    ("text", "rule"), [("", "must not be empty"), (" \n", "must not be empty"), ("x" * 300, "the model reads 200")]
)
def test_a_message_that_cannot_be_asked_changes_nothing(text, rule):
    chat = session()
    with pytest.raises(ConfigError, match=rule):
        chat.ask(text)
    assert chat.turns == []


def test_the_calculator_works_in_a_chat():
    told = [OUTPUT, *spelled("5"), TOLD]
    says = [CALL, *spelled("2+3"), CALLED, *told, *spelled("5"), END]
    prompt = len(
        render(TOKENIZER, parse_conversation({"messages": [{"role": "user", "content": "?"}]}, "f", answered=False))
    )
    chat = ChatSession(ToolLoop(Script(says, prompt=prompt + 1), TOKENIZER), TOKENIZER, 100)
    assert "".join(part.text for part in chat.ask("?")) == "2+355"


@pytest.fixture(scope="module")
def job():
    """The entry point ray_jobs/chat.py as a module."""
    spec = importlib.util.spec_from_file_location("chat_job", ROOT / "ray_jobs" / "chat.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_calls_are_shown_and_nothing_said_steers_the_terminal(job, capsys):
    says = [*spelled("So "), CALL, *spelled("2+3"), CALLED, OUTPUT, *spelled("5"), TOLD, *spelled("5\x1b[2J\n!"), END]
    job.say(session(says), "?")
    assert capsys.readouterr().out == "So [2+3 = 5]5\\x1b[2J\n!\n"


def test_ctrl_c_stops_the_answer_and_not_the_program(job, capsys):
    chat = session([*spelled("abcdef"), END], [*spelled("ok"), END])
    step, calls = chat.source.step, []

    def interrupted():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    chat.source.step = interrupted
    job.say(chat, "one?")
    job.say(chat, "two?")
    assert capsys.readouterr().out == "ab (stopped)\nok\n"
    assert chat.conversation().messages[1].text == "ab"


def test_commands(job, capsys, tmp_path):
    chat = session([*spelled("ok"), END])
    list(chat.ask("hi"))
    job.command(chat, f"/save {tmp_path}/c.jsonl")
    (line,) = (tmp_path / "c.jsonl").read_text().splitlines()
    assert parse_conversation(json.loads(line), "c:1") == chat.conversation()
    job.command(chat, "/temperature 0.5")
    job.command(chat, "/top_k 7")
    job.command(chat, "/seed 3")
    assert (chat.temperature, chat.top_k, chat.seed) == (0.5, 7, 3)
    job.command(chat, "/top_k 0")
    assert chat.top_k is None
    for wrong in ("/temperature hot", "/top_k -1", "/seed", "/temperature nan", "/seed 1.5"):
        with pytest.raises(ConfigError, match=f"{wrong.split()[0]} .*must be a number from 0 on"):
            job.command(chat, wrong)
    job.command(chat, "/show")
    assert "<|assistant_end|>" in capsys.readouterr().out
    job.command(chat, "/new")
    assert chat.turns == []
    job.command(chat, "/what")
    assert "/temperature X" in capsys.readouterr().out
