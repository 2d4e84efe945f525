"""Chat with a checkpoint in the terminal: it streams, shows what the calculator is asked, and knows /help."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tyro

HELP = """/new               begin a new conversation
/show              the tokens of this one; what the model said in green, special tokens in reverse
/save FILE.jsonl   add this one to a file in the `messages` form
/temperature X     0 = the likeliest token; now {temperature}
/top_k N           draw from the N likeliest tokens only, 0 = all; now {top_k}
/seed N            the same seed gives the same answer; now {seed}
/quit, Ctrl-D      leave. Ctrl-C stops an answer"""


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Chat with a trained model; no Ray is started."""

    run_dir: str = "runs/demo"
    """Run directory, a local path or URI."""
    model: str = "sft"
    """Which model: rl, sft, pretrain, or a checkpoint folder."""
    prompt: str | None = None
    """Answer this and leave."""
    temperature: float | None = None
    """0 = the likeliest token; none = what the checkpoint says."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens, 0 = all; none = what the checkpoint says."""
    seed: int = 0
    """Of the draws."""
    max_new_tokens: int = 256
    """Tokens of an answer at most."""

    def __post_init__(self) -> None:
        from nanochat.config.training import below_least, not_rates
        from nanochat.errors import ConfigError

        if found := below_least(self, top_k=0, seed=0, max_new_tokens=1) + not_rates(self, "temperature"):
            raise ConfigError(" ".join(found))


def chat(config: ChatConfig) -> int:
    """Talk until the user leaves."""
    from nanochat.cluster.terminal import run_job
    from nanochat.storage import RunFolder

    return run_job(lambda: _run(config), RunFolder(config.run_dir).ray_log)


def _run(config: ChatConfig) -> None:
    from nanochat.errors import ConfigError

    session, name = load_session(config)
    if config.prompt is not None:
        say(session, config.prompt)
        return
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{name}; /help lists the commands")
    while True:
        try:
            line = input("\n> ") if interactive else input()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
            continue
        if not interactive:
            print(f"> {line[:200]}")
        try:
            if line.strip() in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                command(session, line)
            elif line.strip():
                say(session, line)
        except (ConfigError, OSError) as err:
            print(err)


def load_session(config: ChatConfig) -> tuple[Any, str]:
    """Return a session with the model, and what it is called."""
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.inference.chat_session import ChatSession
    from nanochat.inference.engine import Engine
    from nanochat.inference.load import load_model
    from nanochat.inference.tool_loop import ToolLoop
    from nanochat.run_context import RunContext
    from nanochat.training.checkpoint import named_checkpoint, tokenizer_of

    checkpoint = named_checkpoint(config.run_dir, config.model, print)
    tokenizer = Tokenizer.load(tokenizer_of(config.run_dir, checkpoint.folder))
    gpt = load_model(checkpoint, tokenizer, RunContext())
    engine = Engine(gpt, max_running=1)
    own = checkpoint.generation
    temperature = own.get("temperature", 0.0) if config.temperature is None else config.temperature
    top_k = int(own.get("top_k", 0)) if config.top_k is None else config.top_k
    session = ChatSession(
        ToolLoop(engine, tokenizer), tokenizer, engine.capacity, max_new_tokens=config.max_new_tokens,
        temperature=temperature, top_k=top_k or None, repetition_penalty=own.get("repetition_penalty", 1.0),
        seed=config.seed,
    )  # fmt: skip
    return session, checkpoint.folder


def say(session: Any, text: str) -> None:
    """Print the answer as it comes; Ctrl-C ends it."""
    forgotten = session.forgotten
    pieces: Iterator[Any] = session.ask(text)
    if session.forgotten > forgotten:
        print("(the first turns are forgotten: the model reads no more)")
    kind = "text"
    marks = {("text", "python"): "[", ("python", "python_output"): " = ", ("python_output", "text"): "]"}
    from nanochat.errors import escaped

    try:
        for part in pieces:
            if part.kind != kind:
                print(marks.get((kind, part.kind), " "), end="")
                kind = part.kind
            print("\n".join(escaped(line) for line in part.text.split("\n")), end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        print(" (stopped)", end="")
    print("]" if kind == "python_output" else "")


def command(session: Any, line: str) -> None:
    """Do what a line that begins with a slash says. Raises: ConfigError where its value is none."""
    from nanochat.data.conversations import as_messages, coloured
    from nanochat.errors import ConfigError

    name, _, value = line[1:].partition(" ")
    kinds = {"temperature": float, "top_k": int, "seed": int}
    if name == "new":
        session.forget()
    elif name == "show":
        print(coloured(session.tokenizer, session.ids()))
    elif name == "save" and value and session.conversation().messages:
        with open(value, "a", encoding="utf-8") as file:
            file.write(json.dumps(as_messages(session.conversation()), ensure_ascii=False) + "\n")
        print(f"added to {value}")
    elif name in kinds:
        try:
            number = kinds[name](value)
        except ValueError:
            number = -1
        if not 0 <= number < 1e9:
            raise ConfigError(f"/{name} {value}: must be a number from 0 on. For example /{name} 1")
        setattr(session, name, number or (None if name == "top_k" else number))
    else:
        print(HELP.format(temperature=session.temperature, top_k=session.top_k or 0, seed=session.seed))


if __name__ == "__main__":
    sys.exit(chat(tyro.cli(ChatConfig)))
