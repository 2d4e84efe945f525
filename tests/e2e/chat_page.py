"""What tests of the chat page share: a browser, and the real endpoint over a backend that says what a test wants."""

import asyncio
import os
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator

import pytest
import uvicorn

from nanochat.config.serving import ServingConfig
from nanochat.data.conversations import Part, render_parts
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.inference.requests import Event, Load, PromptReport, Request
from nanochat.inference.sampling import Likelihood
from nanochat.serving.app import create_app
from nanochat.serving.backend import ServedModel

POEM = "The lamp goes round, the sea says hush, and one small boat comes home. " * 4
RICH = """# A heading

Some **bold**, some *slanted*, `code` and a [link](https://example.org/a_(b)).

```python
print("<b>not bold</b>")
```

1. one
2. two
   - inside

> quoted

| a | b |
|---|---|
| 1 | 2 |
"""
EVIL = """<img src=x onerror="window.owned=1"> <script>window.owned=2</script>

[click](javascript:window.owned=3) [data](data:text/html,<script>window.owned=4</script>) ![i](https://example.org/i.png)
<svg onload="window.owned=5"></svg>

```html" onmouseover="window.owned=6
</code></pre><img src=x onerror="window.owned=7">
```
"""
SUM = (Part("text", "37 * 14 is "), Part("python", "37*14"), Part("python_output", "518"), Part("text", ", I am sure."))
ANSWERS = {"poem": (Part("text", POEM),), "rich": (Part("text", RICH),), "evil": (Part("text", EVIL),), "sum": SUM}
"""By a word of the question."""


class ScriptedBackend:
    """Says a fixed answer to what it is asked, a token every so often."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer([], SPLIT_PATTERNS["nanochat"])
        self.models = {
            name: ServedModel(name, self.tokenizer, is_chat, 4096, 0, "nowhere", {"temperature": 0.7, "top_k": 40})
            for name, is_chat in (("sft", True), ("rl", True), ("pretrain", False))
        }
        self.is_healthy = True
        self.token_s = 0.0
        self.waiting = 0
        self.fail_after: dict[int, Exception] = {}
        """At which token of an answer what is raised; each once."""
        self.asked: list[tuple[str, Request]] = []
        self.aborted = 0

    def _ids(self, model: str, request: Request) -> list[int]:
        prompt = self.tokenizer.decode(request.prompt[: len(request.prompt) - request.continued])
        question = prompt.rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
        parts = next((parts for word, parts in ANSWERS.items() if word in question), None)
        if model == "pretrain":
            parts = (Part("text", f" and so on, {len(self.asked)} times."),)
        ids = render_parts(self.tokenizer, parts or (Part("text", f"{model} hears: {question}"),))
        return [*ids, self.tokenizer.special("<|assistant_end|>")]

    def _report(self, request: Request) -> PromptReport:
        if request.prompt_logprobs is None:
            return PromptReport(0)
        others = ((ord("e"), -3.0), (ord(" "), -4.0))
        values = [(id, -0.05 * (place % 40)) for place, id in enumerate(request.prompt[1:])]
        return PromptReport(0, tuple(Likelihood(logprob, ((id, logprob), *others)) for id, logprob in values))

    async def generate(self, model: str, request: Request) -> AsyncGenerator[list[Event], None]:
        self.asked.append((model, request))
        ids = self._ids(model, request)
        ended = False
        try:
            for place in range(request.continued, len(ids)):
                if place in self.fail_after:
                    raise self.fail_after.pop(place)
                await asyncio.sleep(self.token_s)
                is_full = place + 1 == request.continued + request.max_new_tokens
                reason = "stop" if place + 1 == len(ids) else "length" if is_full else None
                ended = reason is not None
                yield [
                    Event(1, ids[place], reason, prompt=None if place > request.continued else self._report(request))
                ]
                if ended:
                    return
        finally:
            self.aborted += not ended

    def load(self) -> Load:
        return Load(waiting=self.waiting)


def serve(backend: ScriptedBackend, config: ServingConfig) -> Iterator[str]:
    """Yield the address of the real endpoint."""
    server = uvicorn.Server(uvicorn.Config(create_app(backend, config), host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = server.force_exit = True
    thread.join(10)


@pytest.fixture(scope="session")
def shared_endpoint() -> Iterator[tuple[ScriptedBackend, str]]:
    backend = ScriptedBackend()
    for url in serve(backend, ServingConfig(event_interval_s=0.005, max_waiting=2)):
        yield backend, url


@pytest.fixture
def backend(shared_endpoint) -> ScriptedBackend:
    """The shared one, as new."""
    shared_endpoint[0].__init__()
    return shared_endpoint[0]


@pytest.fixture(scope="module")  # its driver keeps an event loop running in this thread: other modules have their own
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no chromium; Debian: apt-get install chromium")
    with api.sync_playwright() as driver:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium's sandbox refuses root
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """What opens a page; none may throw, open a dialog, or break its Content-Security-Policy."""
    faults: list[str] = []
    contexts = []

    def open_(url: str, **options):
        context = browser.new_context(accept_downloads=True, **({"viewport": {"width": 1280, "height": 850}} | options))
        context.set_default_timeout(8000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda said: faults.append(said.text) if "Content Security" in said.text else None)
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def page(shared_endpoint, backend, open_page):
    page = open_page(shared_endpoint[1])
    page.get_by_role("heading", name="What shall we talk about?").wait_for()
    return page


def ask(page, text: str) -> None:
    """Send a message, once the page sends one: not while an answer is on its way."""
    page.locator("#send[aria-label=Send]").wait_for()
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def last(page):
    return page.locator(".answer").last


def finish(page) -> None:
    """Wait for all answers."""
    page.locator(".answer[aria-busy=true]").first.wait_for(state="detached")
    last(page).get_by_label("Copy answer").wait_for(state="attached")


def until(is_so: Callable[[], bool], seconds: float = 5) -> None:
    limit = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.02)
