"""Messages and prompts of OpenAI's API to token ids; text never becomes a special token.

The models know no system role: a system or developer message joins the first user turn, as in their training data.
"""

from typing import Any, cast

from nanochat.data.conversations import Conversation, Message, Part, PartKind, render_prompt
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import excerpt
from nanochat.serving.errors import refused


def chat_prompt(tokenizer: Tokenizer, messages: list[Any], max_messages: int) -> list[int]:
    """Return the ids up to where the assistant answers. Raises: ApiError naming the message and the rule."""
    if not messages:
        raise refused("messages", "must not be empty. Send at least one user message.")
    if len(messages) > max_messages:
        raise refused("messages", f"has {len(messages)} messages, at most {max_messages} are read.")
    system: list[str] = []
    parsed: list[Message] = []
    for number, message in enumerate(messages):
        at = f"messages[{number}]"
        if not isinstance(message, dict):
            raise refused(at, "must be an object with role and content.")
        role = message.get("role")
        if role in ("system", "developer") and not parsed:
            system.append("".join(part.text for part in _parts(message, at, "user")))
            continue
        expected = "assistant" if len(parsed) % 2 else "user"
        if role != expected:
            raise refused(
                f"{at}.role", f"is {excerpt(role)}, must be {expected} here: user and assistant in turn, after system "
                "messages. There is no tool role: the calculator is the model's own.",
            )  # fmt: skip
        parts = _parts(message, at, expected)
        if system and expected == "user":
            parts, system = (Part("text", "\n\n".join([*system, ""])), *parts), []
            parts = (Part("text", "".join(part.text for part in parts)),)
        parsed.append(Message(expected, parts))
    if not parsed or parsed[-1].role != "user":
        raise refused("messages", "must end with a user message.")
    return render_prompt(tokenizer, Conversation(tuple(parsed)))


def _parts(message: dict[str, Any], at: str, role: str) -> tuple[Part, ...]:
    """Return a message's parts: of the assistant perhaps none, and calls of its calculator with their output."""
    content = message.get("content")
    if message.get("tool_calls") or message.get("function_call"):
        raise refused(f"{at}.tool_calls", "are not read. Calls are content parts, python and python_output.")
    if content is None and role == "assistant":
        return ()
    listed = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(listed, list):
        raise refused(f"{at}.content", "must be a text or a list of parts of type text.")
    allowed = ("text", "python", "python_output") if role == "assistant" else ("text",)
    parts: list[Part] = []
    for number, part in enumerate(listed):
        where = f"{at}.content[{number}]"
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind not in allowed:
            raise refused(f"{where}.type", f"is {excerpt(kind)}, must be {' or '.join(allowed)} here.")
        if not isinstance(text, str):
            raise refused(f"{where}.text", "must be a text.")
        if (kind == "python_output") != bool(parts and parts[-1].kind == "python"):
            raise refused(where, "a python part is followed by its python_output, and nothing else is.")
        parts.append(Part(cast(PartKind, kind), text))
    if parts and parts[-1].kind == "python":
        raise refused(f"{at}.content", "ends with a python part; its python_output is missing.")
    if role == "user" and not any(part.text for part in parts):
        raise refused(f"{at}.content", "must not be empty.")
    # Neighbouring texts are one, as in every chat template: apart, a token could not span them.
    joined: list[Part] = []
    for part in (part for part in parts if part.text or part.kind != "text"):
        if joined and joined[-1].kind == part.kind == "text":
            part = Part("text", joined.pop().text + part.text)
        joined.append(part)
    return tuple(joined)


def completion_prompts(tokenizer: Tokenizer, prompt: str | list[Any], max_prompts: int) -> list[list[int]]:
    """Return the ids of each prompt: a text, ids, or a list of either. Text gets BOS before it.

    Raises: ApiError if it is of another form.
    """
    if isinstance(prompt, str) or (prompt and all(_is_id(one) for one in prompt)):
        prompt = [prompt]
    if not prompt:
        raise refused("prompt", "must not be empty.")
    if len(prompt) > max_prompts:
        raise refused("prompt", f"has {len(prompt)} prompts, at most {max_prompts} are read at once.")
    prompts = []
    for number, one in enumerate(prompt):
        if isinstance(one, str):
            prompts.append([tokenizer.bos, *tokenizer.encode_ordinary(one)])
            continue
        if not isinstance(one, list) or not one or not all(_is_id(id) for id in one):
            raise refused(f"prompt[{number}]", "must be a text, or a list of ids that is not empty.")
        if (greatest := max(one)) >= tokenizer.vocab_size:
            raise refused(f"prompt[{number}]", f"{greatest} is no id of this model's {tokenizer.vocab_size} tokens.")
        prompts.append(one)
    return prompts


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
