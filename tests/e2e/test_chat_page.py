"""The chat page in a real browser: conversations, and servers that are busy, broken or locked."""

import json
from pathlib import Path

import pytest

from nanochat.config.serving import ServingConfig
from nanochat.serving.backend import BackendDeadError

pytest.register_assert_rewrite("chat_page")
from chat_page import POEM, ask, finish, last, serve, until  # noqa: E402

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

pytest_plugins = ["chat_page"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(30)]


def test_text_streams_and_ends_with_its_numbers(page, backend) -> None:
    backend.token_s = 0.01
    ask(page, "a poem")
    lengths = set()
    for _ in range(12):
        lengths.add(len(last(page).locator(".said").inner_text()))
        page.wait_for_timeout(80)
    assert len(lengths) > 5
    backend.token_s = 0
    finish(page)
    assert last(page).locator(".said").inner_text() == POEM.strip()
    for told in ("tokens", "tok/s", "first after", "stop"):
        expect(last(page).locator(".stats")).to_contain_text(told)
    expect(page.get_by_role("status").last).to_contain_text("Answer: The lamp")
    # The model's own defaults: the page sends none of its own, but for a seed.
    request = backend.asked[-1][1]
    assert (request.temperature, request.top_k) == (0.7, 40)


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_aborts_on_the_server_and_the_answer_can_go_on(page, backend, way) -> None:
    backend.token_s = 0.02
    ask(page, "a poem")
    expect(last(page)).to_contain_text("The lamp")
    if way == "button":
        page.get_by_role("button", name="Stop", exact=True).click()
    else:
        page.keyboard.press("Escape")
    until(lambda: backend.aborted == 1)
    finish(page)
    expect(last(page).locator(".stats")).to_contain_text("stopped")
    assert len(last(page).locator(".said").inner_text()) < len(POEM) / 2
    backend.token_s = 0
    last(page).get_by_role("button", name="Continue").click()
    expect(last(page).locator(".said")).to_have_text(POEM.strip())
    (_, first), (_, second) = backend.asked
    assert second.continued > 0
    assert second.seed == first.seed


def test_edits_and_regenerated_answers_are_branches(page, backend) -> None:
    ask(page, "one")
    finish(page)
    ask(page, "two")
    finish(page)
    page.get_by_label("Edit message").first.click()
    page.get_by_role("textbox", name="Edit message").fill("three")
    page.keyboard.press("Enter")
    expect(last(page)).to_contain_text("sft hears: three")
    finish(page)
    expect(page.locator(".bubble")).to_have_text(["three"])
    expect(page.locator(".branches")).to_have_text(["2/2"])
    page.get_by_label("Previous branch").click()
    expect(page.locator(".bubble")).to_have_text(["one", "two"])
    last(page).get_by_label("Regenerate").click()
    finish(page)
    expect(last(page).locator(".branches")).to_have_text("2/2")
    assert backend.asked[-1][1].prompt == backend.asked[1][1].prompt
    assert backend.asked[-1][1].seed != backend.asked[1][1].seed
    last(page).get_by_label("Previous branch").click()
    expect(last(page).locator(".branches")).to_have_text("1/2")


def test_history_is_there_after_a_reload(page, backend) -> None:
    ask(page, "remember this")
    finish(page)
    page.keyboard.press("Control+Shift+O")
    expect(page.locator(".bubble")).to_have_count(0)
    ask(page, "another matter")
    finish(page)
    page.reload()
    expect(page.locator(".bubble")).to_have_text(["another matter"])
    page.get_by_label("Search conversations").fill("hears: remember")
    expect(page.locator("#list .entry")).to_have_count(1)
    page.get_by_role("button", name="remember this", exact=True).click()
    expect(last(page)).to_contain_text("sft hears: remember this")
    page.get_by_label("Rename remember this").click()
    page.get_by_label("New name").fill("kept")
    page.keyboard.press("Enter")
    page.get_by_label("Search conversations").fill("")
    page.get_by_label("Delete kept").click()
    expect(page.locator("#list .entry")).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".bubble")).to_have_text(["remember this"])
    # A page that goes away in the middle keeps what it had.
    backend.token_s = 0.02
    ask(page, "a poem")
    expect(last(page)).to_contain_text("The lamp")
    page.reload()
    until(lambda: backend.aborted == 1)
    expect(last(page)).to_contain_text("The lamp")
    backend.token_s = 0
    last(page).get_by_role("button", name="Continue").click()
    expect(last(page).locator(".said")).to_have_text(POEM.strip())


@pytest.mark.parametrize("error", [BackendDeadError("the engine has died."), RuntimeError("unforeseen")])
def test_a_cut_stream_is_continued(page, backend, error) -> None:
    backend.token_s = 0.005
    backend.fail_after = {40: error, 90: BackendDeadError("again.")}
    ask(page, "a poem")
    expect(last(page)).to_contain_text("Continuing the answer (1 of 3)")
    finish(page)
    expect(last(page).locator(".said")).to_have_text(POEM.strip())
    expect(last(page).locator(".stats")).to_contain_text("continued 2")
    # What the browser had not read yet goes with the connection, and is asked for again.
    begun, once, twice = (request.continued for _, request in backend.asked)
    assert begun == 0 < once <= 40 < twice <= 90
    assert len({request.seed for _, request in backend.asked}) == 1


def test_a_stream_that_ends_cleanly_but_early_is_cut_too(page, backend) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "The "}, "finish_reason": None, "token_ids": list(b"The ")}]}
    body = f": hello\r\n\r\ndata: {json.dumps(chunk)}\r\n\r\n"
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"), times=1
    )
    ask(page, "a poem")
    expect(last(page).locator(".said")).to_have_text(POEM.strip())
    assert [request.continued for _, request in backend.asked] == [4]


EVENTS = (
    ': note\r\n\r\ndata: {"a":"\U0001f600"}\r\n\r\ndata:one\r\ndata: two\r\n\n'
    "event: x\rdata: three\r\r\ndata: [DONE]\n\n"
)


def test_events_are_parsed_however_they_are_cut(page) -> None:
    script = """async (text) => {
        const bytes = new TextEncoder().encode(text), results = [];
        for (let size = 1; size <= bytes.length; size += 1) {
            const stream = new ReadableStream({ start(controller) {
                for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                controller.close();
            } });
            const found = [];
            for await (const data of events(stream)) found.push(data);
            results.push(JSON.stringify(found));
        }
        return [...new Set(results)];
    }"""
    (parsed,) = page.evaluate(script, EVENTS)
    assert json.loads(parsed) == ['{"a":"\U0001f600"}', "one\ntwo", "three", "[DONE]"]


def test_a_busy_server_is_asked_again(page, backend) -> None:
    backend.waiting = 100
    ask(page, "hello")
    expect(last(page)).to_contain_text("The server is busy (429). Trying again in")
    backend.waiting = 0
    expect(last(page)).to_contain_text("sft hears: hello")
    finish(page)
    backend.waiting = 100
    ask(page, "hello again")
    last(page).get_by_role("button", name="Cancel").click()
    expect(last(page).locator(".stats")).to_contain_text("stopped")


def test_a_refusal_is_shown(page, backend) -> None:
    ask(page, "x" * 5000)
    expect(last(page).locator(".status.bad")).to_contain_text("this model reads 4096")
    expect(last(page).get_by_role("button", name="Try again")).to_be_visible()


def test_a_question_that_is_too_long_is_not_asked_again_and_goes_on_in_a_new_chat(page, backend) -> None:
    ask(page, "a poem")
    finish(page)
    ask(page, "much too long " * 400)
    expect(last(page)).to_contain_text("Shorten it.")
    ask(page, "short")
    expect(last(page)).to_contain_text("sft hears: short")
    prompt = backend.asked[-1][1].prompt
    assert b"much too long" not in bytes(id for id in prompt if id < 256)
    assert b"a poem" in bytes(id for id in prompt if id < 256)
    text = "almost too long " * 240
    ask(page, text)
    expect(last(page)).to_contain_text("Shorten it.")
    page.get_by_role("button", name="Ask it in a new chat").last.click()
    expect(last(page)).to_contain_text("sft hears: almost")
    assert page.locator(".answer").count() == 1


def test_a_key_is_asked_for_and_sent(open_page, backend, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sesame\n")
    for url in serve(backend, ServingConfig(api_keys_file=str(tmp_path / "keys"))):
        page = open_page(url)
        box = page.get_by_role("dialog", name="API key")
        box.get_by_label("API key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        expect(box.get_by_text("asks for an API key")).to_be_visible()
        box.get_by_label("API key", exact=True).fill("sesame")
        box.get_by_role("button", name="Save").click()
        page.get_by_role("heading", name="What shall we talk about?").wait_for()
        ask(page, "open")
        expect(last(page)).to_contain_text("sft hears: open")
        assert page.evaluate("[sessionStorage['nanochat.key'], localStorage['nanochat.key']]") == ["sesame", None]
        # A key that stops being right is asked for where it is needed, and the answer comes after all.
        page.evaluate("sessionStorage['nanochat.key'] = 'old'")
        ask(page, "again")
        box.get_by_label("API key", exact=True).fill("sesame")
        box.get_by_label("Remember").check()
        box.get_by_role("button", name="Save").click()
        expect(last(page)).to_contain_text("sft hears: again")
        assert page.evaluate("localStorage['nanochat.key']") == '"sesame"'


def test_an_answer_at_its_limit_can_be_continued(page, backend) -> None:
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Max tokens").fill("50")
    ask(page, "a poem")
    expect(last(page).locator(".stats")).to_contain_text("length")
    last(page).get_by_role("button", name="Continue").click()
    expect(last(page).locator(".said")).to_have_text(POEM[:100].strip())
    assert [request.continued for _, request in backend.asked] == [0, 50]
