"""The chat page in a real browser: what it shows, to whom, and what no answer can make it do."""

import json
from pathlib import Path

import pytest

from nanochat.data.conversations import parse_conversation, render_parts

pytest.register_assert_rewrite("chat_page")
from chat_page import SUM, ask, finish, last  # noqa: E402

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

pytest_plugins = ["chat_page"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(30)]


def test_an_answer_cannot_do_anything(page) -> None:
    ask(page, "evil")
    finish(page)
    page.wait_for_timeout(300)
    assert page.evaluate("window.owned") is None
    expect(page.locator(".said :is(img, script, iframe, a[href^=javascript], a[href^=data])")).to_have_count(0)
    expect(page.locator(".said svg:not(.icon)")).to_have_count(0)
    handlers = (
        "[...document.querySelectorAll('.said *')].some((el) => [...el.attributes].some((a) => /^on/i.test(a.name)))"
    )
    assert page.evaluate(handlers) is False
    expect(last(page)).to_contain_text('<img src=x onerror="window.owned=1">')
    expect(last(page)).to_contain_text("[click](javascript:window.owned=3)")
    # The same out of the browser's own storage, and in a title.
    ask(page, "<img src=x onerror=window.owned=8>")
    finish(page)
    page.reload()
    expect(last(page)).to_contain_text("hears: <img")
    assert page.evaluate("window.owned") is None


def test_markdown_and_calls_are_elements(page, backend) -> None:
    ask(page, "rich")
    finish(page)
    said = last(page).locator(".said")
    for selector, text in {
        "h3": "A heading", "strong": "bold", "em": "slanted", "p code": "code", "pre": 'print("<b>not bold</b>")\n',
        "ol > li:first-child": "one", "ol ul li": "inside", "blockquote": "quoted", "td:last-child": "2",
    }.items():  # fmt: skip
        assert said.locator(selector).inner_text().strip() == text.strip()
    link = said.locator("a")
    assert link.get_attribute("href") == "https://example.org/a_(b)"
    assert link.get_attribute("rel") == "noopener noreferrer"
    ask(page, "sum")
    finish(page)
    assert last(page).locator(".call").inner_text().split() == ["37*14", "=", "518"]
    # The next question brings back what the model said, call and all.
    ask(page, "thanks")
    finish(page)
    said_ids = "".join(map(chr, render_parts(backend.tokenizer, SUM)))
    assert said_ids in "".join(map(chr, backend.asked[-1][1].prompt))


def test_a_base_model_continues_a_text(page, backend) -> None:
    page.get_by_label("Model", exact=True).select_option("pretrain")
    sheet = page.get_by_label("Text that the model continues")
    sheet.fill("Once upon a time")
    page.keyboard.press("Control+Enter")
    expect(sheet).to_have_value("Once upon a time and so on, 1 times.")
    page.get_by_role("button", name="Try again").click()
    expect(sheet).to_have_value("Once upon a time and so on, 2 times.")
    expect(page.locator("#rawbar .branches")).to_have_text("2/2")
    page.get_by_label("Previous branch").click()
    expect(sheet).to_have_value("Once upon a time and so on, 1 times.")
    page.get_by_role("button", name="Continue").click()
    expect(sheet).to_have_value("Once upon a time and so on, 1 times. and so on, 3 times.")
    page.get_by_role("button", name="Undo").click()
    expect(sheet).to_have_value("Once upon a time and so on, 1 times.")
    page.reload()
    expect(sheet).to_have_value("Once upon a time and so on, 1 times.")


def test_two_models_answer_side_by_side(page, backend) -> None:
    ask(page, "first")
    finish(page)
    page.get_by_label("Compare two models").click()
    page.get_by_label("Second model").select_option("rl")
    backend.token_s = 0.01
    ask(page, "second thought")
    expect(page.locator(".answer[aria-busy=true]")).to_have_count(2)
    expect(page.locator(".answer").nth(2)).to_contain_text("sft hears: second thought")
    expect(page.locator(".answer").nth(3)).to_contain_text("rl hears: second thought")
    (one, first), (other, second) = backend.asked[-2:]
    assert {one, other} == {"sft", "rl"}
    assert (first.prompt, first.seed) == (second.prompt, second.seed)
    finish(page)  # elements are replaced while text comes in
    left, right = (page.locator(".answer").nth(number).bounding_box() for number in (2, 3))
    assert abs(left["y"] - right["y"]) < 2
    assert right["x"] > left["x"] + left["width"] / 2
    page.get_by_label("Second model").select_option("pretrain")
    ask(page, "third")
    expect(last(page)).to_contain_text("and so on")
    expect(page.locator(".bubble")).to_have_count(3)


def test_an_export_is_training_data_and_comes_back(page, backend, tmp_path: Path) -> None:
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("System message").fill("Be kind.")
    page.get_by_label("Temperature", exact=True).fill("1.5")
    page.get_by_label("Seed").fill("7")
    for text in ("a sum", "hello"):
        ask(page, text)
        finish(page)
    request = backend.asked[-1][1]
    assert (request.temperature, request.seed, request.top_k) == (1.5, 7, 40)
    with page.expect_download() as waiting:
        page.get_by_label("Export this conversation (SFT JSONL)").click()
    path = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(path)
    (line,) = path.read_text().splitlines()
    conversation = parse_conversation(json.loads(line), "export:1")
    question, answer, *_ = conversation.messages
    assert question.text == "Be kind.\n\na sum"
    assert answer.parts == SUM
    assert [message.role for message in conversation.messages] == ["user", "assistant"] * 2
    page.get_by_label("Delete a sum").click()
    page.get_by_label("File to import").set_input_files(path)
    expect(page.locator(".bubble")).to_have_text(["a sum", "hello"])
    expect(page.locator(".call")).to_have_count(1)


def test_tokens_show_what_else_they_might_have_been(page) -> None:
    ask(page, "sum")
    finish(page)
    last(page).get_by_label("Tokens and their probabilities").click()
    tokens = last(page).locator(".token")
    expect(tokens.first).to_have_text("3")
    expect(last(page).locator(".token.told")).to_have_count(5)
    tokens.nth(1).hover()
    expect(page.get_by_role("tooltip")).to_contain_text("%")
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(page.get_by_role("tooltip").locator(".bar.chosen")).to_contain_text("7")
    expect(last(page).locator(".legend")).to_contain_text("perplexity")


def test_a_phone_scrolls_in_one_direction_only(shared_endpoint, backend, open_page) -> None:
    page = open_page(shared_endpoint[1], viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True)
    ask(page, "rich " + "w" * 300)
    finish(page)
    page.get_by_label("Compare two models").click()
    ask(page, "sum")
    finish(page)
    page.get_by_role("button", name="Conversations").click()
    expect(page.get_by_role("button", name="New chat")).to_be_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings", exact=True).click()
    expect(page.get_by_label("Temperature", exact=True)).to_be_visible()
    page.get_by_label("Close settings").click()
    wide = """['#main', '#thread', '#head', '#bottom', '#column'].filter((name) => {
        const el = document.querySelector(name);
        return el.scrollWidth > el.clientWidth + 1;
    })"""
    assert page.evaluate(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 375


def test_a_thousand_tokens_a_second_leave_the_page_awake(page) -> None:
    """A slow frame would show as a long gap between two of them."""
    script = """async () => {
        const node = { id: "x", parts: [] }, el = document.createElement("div"), gaps = [];
        document.body.append(el);
        views.set("x", () => showParts(el, node.parts));
        let last = performance.now(), going = true;
        const watch = (now) => { gaps.push(now - last); last = now; if (going) requestAnimationFrame(watch); };
        requestAnimationFrame(watch);
        for (let count = 0; count < 3000; count += 20) {
            const text = "some **words** and `code` go by. ".repeat(2) + (count % 400 ? "" : "\\n\\n");
            append(node.parts, { type: "text", text });
            touch(node);
            await new Promise((go) => setTimeout(go, 8));
        }
        going = false; el.remove();
        return gaps.sort((one, other) => one - other);
    }"""
    gaps = page.evaluate(script)
    assert gaps[int(len(gaps) * 0.95)] < 150
