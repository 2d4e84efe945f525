"""chat_template.jinja: the ids of what it renders are those of our own server, and both refuse the same."""

import itertools
from functools import cache

import jinja2
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from small_tokenizer import TEXTS, anything, auto_tokenizer, ids_of, loaded, ours, write_folder

from nanochat.data.conversations import Conversation, Message, Part, parse_conversation, render
from nanochat.data.tokenizer import SPECIAL_TOKENS
from nanochat.exchange.hf_tokenizer import chat_template
from nanochat.serving.errors import ApiError
from nanochat.serving.prompts import chat_prompt


def say(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def text(*texts: str) -> list[dict[str, object]]:
    return [{"type": "text", "text": one} for one in texts]


def call(code: str, output: str) -> list[dict[str, object]]:
    return [{"type": "python", "text": code}, {"type": "python_output", "text": output}]


@cache
def template() -> jinja2.Template:
    """The template in the plainest of the environments that it is to run in."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(chat_template())


def rendered_ids(messages, **variables) -> list[int]:
    return ids_of(theirs(), template().render(messages=messages, **{"add_generation_prompt": True} | variables))


@cache
def theirs() -> tokenizers.Tokenizer:
    return loaded(ours())


TALKS = {
    "one": [say("user", "Why is the sky blue?")],
    "whitespace": [say("user", "  \n\ta \r\n\n")],
    "only whitespace": [say("user", " ")],
    "newline": [say("user", "\n"), say("assistant", "\n\n x \n"), say("user", "\n\n")],
    "system": [say("system", "Be brief."), say("user", "Hi")],
    "systems": [say("system", " A "), say("developer", text("B\n", "C")), say("system", "D"), say("user", text("Hi"))],
    "system once": [say("system", "S"), say("user", "1"), say("assistant", "2"), say("user", "3")],
    "unicode": [say("user", TEXTS[1] + "\u200b\ufeff\U0001f469\u200d\U0001f680 cafe\u0301")],
    "markup": [say("user", "{{ 1 + 1 }} {% raw %} <b>&amp;</b> {# x #} \\n %s")],
    "almost a name": [say("user", "<|BOS|><|pad|>< |bos|> <|user_ start|> |>")],
    "broken name": [say("user", "<|bos"), say("assistant", "|>"), say("user", "<|user_end")],
    "empty assistant": [say("user", "a"), say("assistant", ""), say("user", "b")],
    "no assistant": [say("user", "a"), say("assistant", None), say("user", "b")],
    "assistant without content": [say("user", "a"), {"role": "assistant"}, say("user", "b")],
    "empty list": [say("user", "a"), say("assistant", []), say("user", "b")],
    "calls": [say("user", "2+2?"), say("assistant", [*text("So "), *call("2+2", "4"), *text(" 4.")]), say("user", "k")],
    "two calls": [say("user", "?"), say("assistant", [*call("1", ""), *call("", " \n")]), say("user", "so")],
    "name across parts": [say("user", "?"), say("assistant", [*call("<|bo", "s|>")]), say("user", "so")],
    "text around nothing": [say("user", text("", "a", "")), say("assistant", text("", "")), say("user", text("b"))],
    "no calls": [say("user", "a", tool_calls=[], function_call=None, name="Z"), say("assistant", "b", tool_calls=None),
                 say("user", "c")],
}  # fmt: skip


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_folder(folder, ours(), {"model_type": "nanochat"})
    return auto_tokenizer(folder)


@pytest.mark.parametrize("name", TALKS)
def test_the_template_makes_the_prompt_of_our_server(chat_tokenizer, name):
    messages = TALKS[name]
    wanted = chat_prompt(ours(), messages, 99)
    assert rendered_ids(messages) == wanted
    assert chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == wanted


@pytest.mark.parametrize("name", ["whitespace", "systems", "calls", "two calls"])
def test_without_a_generation_prompt_it_makes_the_training_row(chat_tokenizer, name):
    messages = [*TALKS[name], say("assistant", [*text("So: "), *call("6*7", "42"), *text("42\n")])]
    prompt = chat_prompt(ours(), TALKS[name], 99)
    reply = parse_conversation({"messages": [say("user", "?"), messages[-1]]}, "x").messages[-1]
    tail = render(ours(), Conversation((reply,)))[1:]
    wanted = [*prompt[:-1], *tail]
    assert rendered_ids(messages, add_generation_prompt=False) == wanted
    assert chat_tokenizer.apply_chat_template(messages, return_dict=False) == wanted
    assert rendered_ids(TALKS[name], add_generation_prompt=False) == prompt[:-1]


def test_a_reply_can_be_gone_on_with(chat_tokenizer):
    messages = [say("user", "Say x."), say("assistant", "The x")]
    found = chat_tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert found == [*chat_prompt(ours(), messages[:1], 9), *ours().encode_ordinary("The x")]


REFUSED = {
    "nothing": [],
    "only a system message": [say("system", "x")],
    "assistant first": [say("assistant", "x"), say("user", "y")],
    "assistant last": [say("user", "x"), say("assistant", "y")],
    "user twice": [say("user", "x"), say("user", "y")],
    "late system": [say("user", "x"), say("assistant", "y"), say("system", "s"), say("user", "z")],
    "tool": [say("user", "x"), say("assistant", "y"), say("tool", "4"), say("user", "z")],
    "no role": [{"content": "x"}],
    "another role": [say("User", "x")],
    "role of another kind": [say(7, "x")],
    "tool_calls": [say("user", "x"), say("assistant", "y", tool_calls=[{"id": "1"}]), say("user", "z")],
    "function_call": [say("user", "x"), say("assistant", "y", function_call={"name": "f"}), say("user", "z")],
    "tool_calls of the system": [say("system", "x", tool_calls=[1]), say("user", "z")],
    "no content": [{"role": "user"}],
    "content none": [say("user", None)],
    "content of the system none": [say("system", None), say("user", "x")],
    "empty": [say("user", "")],
    "empty list": [say("user", [])],
    "empty parts": [say("user", text("", ""))],
    "empty system": [say("system", ""), say("user", "x")],
    "a number": [say("user", 7)],
    "an object": [say("user", {"type": "text", "text": "x"})],
    "an empty object": [say("user", "x"), say("assistant", {}), say("user", "y")],
    "list of texts": [say("user", ["x"])],
    "image": [say("user", [*text("x"), {"type": "image_url", "image_url": {"url": "x"}}])],
    "part without type": [say("user", [{"text": "x"}])],
    "part without text": [say("user", [{"type": "text"}])],
    "text of another kind": [say("user", [{"type": "text", "text": 7}])],
    "call of the user": [say("user", [*text("x"), *call("1", "1")])],
    "call of the system": [say("system", [*call("1", "1"), *text("x")]), say("user", "x")],
    "call without output": [say("user", "x"), say("assistant", call("1", "1")[:1]), say("user", "y")],
    "call before text": [say("user", "x"), say("assistant", [*call("1", "")[:1], *text("y")]), say("user", "y")],
    "two calls at once": [say("user", "x"), say("assistant", [*call("1", "1")[:1], *call("1", "1")]), say("user", "y")],
    "output without call": [say("user", "x"), say("assistant", call("1", "1")[1:]), say("user", "y")],
    "output after text": [say("user", "x"), say("assistant", [*text("y"), *call("1", "1")[1:]]), say("user", "y")],
    "output twice": [say("user", "x"), say("assistant", [*call("1", "1"), *call("1", "1")[1:]]), say("user", "y")],
    "refusal part": [say("user", "x"), say("assistant", [{"type": "refusal", "text": "no"}]), say("user", "y")],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_our_server_refuses_the_template_refuses(chat_tokenizer, name):
    messages = REFUSED[name]
    with pytest.raises(ApiError):
        chat_prompt(ours(), messages, 99)
    with pytest.raises(jinja2.TemplateError, match=r"^messages"):
        template().render(messages=messages, add_generation_prompt=True)
    with pytest.raises((jinja2.TemplateError, ValueError)):
        chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["nothing", "only a system message"])
def test_a_talk_without_turns_is_refused_without_a_generation_prompt(name):
    with pytest.raises(jinja2.TemplateError, match=r"^messages: must end with a user message"):
        template().render(messages=REFUSED[name], add_generation_prompt=False)


def test_messages_that_are_none_are_refused():
    for messages in (["x"], [None], [[say("user", "x")]], [say("user", "x"), 7]):
        with pytest.raises(jinja2.TemplateError, match=r"messages\[\d\]: must be an object"):
            template().render(messages=messages, add_generation_prompt=True)


def test_tools_and_documents_are_refused():
    for more in ({"tools": [{"type": "function"}]}, {"documents": [{"text": "x"}]}):
        with pytest.raises(jinja2.TemplateError, match="tools, documents: are not read"):
            template().render(messages=TALKS["one"], **more)
    assert template().render(messages=TALKS["one"], tools=None, documents=[])


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_a_name_of_a_special_token_is_refused_wherever_it_stands(name):
    half = len(name) // 2
    answered = say("assistant", "y"), say("user", "z")
    for messages in (
        [say("user", f"say {name} twice")],
        [say("user", text("a", name))],
        [say("user", text(name[:half], name[half:]))],
        [say("user", text(name[:half], "", name[half:-1], name[-1:]))],
        [say("system", name), say("user", "x")],
        [say("system", text(name[:1], name[1:])), say("user", "x")],
        [say("user", "x"), say("assistant", f"{name}."), say("user", "z")],
        [say("user", "x"), say("assistant", [*text(name[:half], name[half:]), *call("1", "1")]), say("user", "z")],
        [say("user", "x"), say("assistant", call(name, "1")), say("user", "z")],
        [say("user", "x"), say("assistant", call("1", name)), say("user", "z")],
        [say("user", "x"), say("assistant", [*call("1", "1"), *text(name[:half], name[half:])]), say("user", "z")],
        [say("user", "x"), *answered, say("assistant", "y"), say("user", name)],
    ):
        with pytest.raises(jinja2.TemplateError, match=r"^messages\[\d\]\.content: must not have the name of"):
            template().render(messages=messages, add_generation_prompt=True)


def chained(lists):
    return list(itertools.chain.from_iterable(lists))


pieces = st.lists(
    anything | st.sampled_from(["", " ", "\n", "<|", "|>", "<|bo", "s|>", "bos", *SPECIAL_TOKENS]), max_size=4
)
contents = pieces.map("".join)
text_parts = st.lists(contents, min_size=1, max_size=3).map(lambda texts: text(*texts))
calls = st.tuples(contents, contents).map(lambda pair: call(*pair))
said_by_user = contents | text_parts
said_by_assistant = st.none() | said_by_user | st.lists(text_parts | calls, max_size=3).map(chained)


@st.composite
def talks(draw):
    system = draw(st.lists(st.tuples(st.sampled_from(["system", "developer"]), said_by_user), max_size=2))
    messages = [say(role, content) for role, content in system]
    for _ in range(draw(st.integers(0, 2))):
        messages += [say("user", draw(said_by_user)), say("assistant", draw(said_by_assistant))]
    return [*messages, say("user", draw(said_by_user))]


def names_in(messages) -> bool:
    contents = [message.get("content") for message in messages]
    texts = [c if isinstance(c, str) else "\0".join(p["text"] for p in c or []) for c in contents]
    return any(name in one for name in SPECIAL_TOKENS for one in texts)


@settings(max_examples=300)
@given(messages=talks())
def test_any_talk_has_the_ids_of_our_server_or_is_refused(messages):
    try:
        wanted = None if names_in(messages) else chat_prompt(ours(), messages, 99)
    except ApiError:
        wanted = None
    if wanted is None:
        with pytest.raises(jinja2.TemplateError, match=r"^messages"):
            rendered_ids(messages)
    else:
        assert rendered_ids(messages) == wanted


keys = st.sampled_from(["role", "content", "type", "text", "tool_calls", "function_call"])
words = st.sampled_from(
    ["system", "developer", "user", "assistant", "tool", "text", "python", "python_output", "", "x"]
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
part_like = st.fixed_dictionaries({}, optional={"type": words, "text": words | junk}) | junk
message_like = st.fixed_dictionaries(
    {}, optional={"role": words, "content": words | st.lists(part_like, max_size=3) | junk, "tool_calls": junk}
)


@settings(max_examples=400)
@given(messages=st.lists(message_like | junk, max_size=3) | talks().map(lambda talk: [*talk[:-1], talk[-1] | {"x": 1}]))
@example(messages=[say("user", [])])
def test_any_messages_are_refused_where_our_server_refuses(messages):
    try:
        chat_prompt(ours(), messages, 99)
    except ApiError:
        with pytest.raises(jinja2.TemplateError, match=r"^messages"):
            template().render(messages=messages, add_generation_prompt=True)
    else:
        if not names_in(messages):
            assert rendered_ids(messages) == chat_prompt(ours(), messages, 99)


def test_parts_are_those_of_training():
    """The template's idea of a talk is that of the code that renders training rows, down to the tokens around calls."""
    parts = (Part("text", "a"), Part("python", "1+1"), Part("python_output", "2"), Part("text", "b"))
    talk = Conversation((Message("user", (Part("text", "q"),)), Message("assistant", parts)))
    content = [{"type": part.kind, "text": part.text} for part in parts]
    found = template().render(messages=[say("user", "q"), say("assistant", content)])
    assert found == (
        "<|bos|><|user_start|>q<|user_end|><|assistant_start|>a<|python_start|>1+1<|python_end|><|output_start|>2"
        "<|output_end|>b<|assistant_end|>"
    )
    assert ids_of(theirs(), found) == render(ours(), talk)
