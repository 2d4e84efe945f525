"""The engine gives every request what it would get alone; the tool loop puts the tool's words in."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config.model import ModelConfig
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.errors import CheckpointError, ConfigError
from nanochat.inference.completions import complete
from nanochat.inference.decoding_graphs import DecodingGraphs
from nanochat.inference.engine import CHUNK_TOKENS, Engine
from nanochat.inference.paged_cache import PAGE_TOKENS, FlatBatch
from nanochat.inference.requests import Event, PromptReport, Request
from nanochat.inference.sampling import uniform
from nanochat.inference.tool_loop import MAX_CALLS, NO_RESULT, ToolLoop
from nanochat.model.gpt import GPT

STOP = 0


def random_model(seed: int = 0) -> GPT:
    """Every part of the architecture is on, and rows are longer than a short window would be."""
    model = GPT(ModelConfig(sequence_len=64, vocab_size=40, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, smear=True))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.4)
    return model


def slowly(model: GPT, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Take the likeliest token again and again, the whole row through the model each time."""
    tokens, device = list(prompt), model.lm_head.weight.device
    for _ in range(max_new_tokens):
        with torch.no_grad():
            tokens.append(int(model.logits(model(torch.tensor([tokens], device=device)))[0, -1].argmax()))
        if tokens[-1] == STOP:
            break
    return tokens[len(prompt) :]


def request(prompt: list[int], **changes) -> Request:
    settings = {"max_new_tokens": 24, "stop_tokens": frozenset({STOP})} | changes
    return Request(prompt=tuple(prompt), **settings)


PROMPTS = [[5], [7, 3, 9, 11, 2], [1, 2, 3], [30, 31, 32, 33, 34, 35, 36, 37, 38], [8, 8], [12], [13, 14], [15, 16, 17]]


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 32])
def test_each_request_is_completed_as_it_would_be_by_itself(slots, device):
    lengths = set()
    for seed in (1, 2):
        model = random_model(seed).to(device)
        expected = [slowly(model, prompt, 24) for prompt in PROMPTS]
        completions = complete(Engine(model, max_running=slots), [request(prompt) for prompt in PROMPTS])
        assert [one.tokens for one in completions] == expected
        for one in completions:
            assert one.finish_reason == ("stop" if one.tokens[-1] == STOP else "length")
            assert not any(one.is_forced)
        lengths |= {len(tokens) for tokens in expected}
    assert len(lengths) > 1, "some stopped early"


def test_other_weights_lie_where_the_old_ones_did():
    """Where graphs read them, the fused ones included."""
    model, other = random_model(1).prepare_for_inference(), random_model(2)
    engine = Engine(model, max_running=2)
    fused = [block.attn.c_qkv.weight for block in model.blocks]
    before = [weight.data_ptr() for weight in [*model.parameters(), *fused]]
    engine.load_weights(other.state_dict())
    assert all(block.attn.c_qkv.weight is weight for block, weight in zip(model.blocks, fused, strict=True))
    assert [weight.data_ptr() for weight in [*model.parameters(), *fused]] == before
    for weight, block in zip(fused, other.blocks, strict=True):
        assert torch.equal(
            weight, torch.cat([part.weight for part in (block.attn.c_q, block.attn.c_k, block.attn.c_v)])
        )
    assert complete(engine, [request([7, 3, 9])])[0].tokens == slowly(other, [7, 3, 9], 24)


@pytest.mark.parametrize("change", [{"lm_head.weight": None}, {"lm_head.weight": torch.zeros(2, 2)},
                                    {"other": torch.zeros(1)}], ids=["lacks", "shape", "unknown"])  # fmt: skip
def test_weights_of_another_model_are_refused_and_nothing_changes(change):
    engine = Engine(random_model(1), max_running=2)
    weights = {name: one for name, one in (random_model(2).state_dict() | change).items() if one is not None}
    engine.add(request([7, 3, 9]))
    events = engine.step()
    with pytest.raises(CheckpointError, match=f"weights: does not fit the model in {next(iter(change))}"):
        engine.load_weights(weights)
    while events[-1].finish_reason is None:
        events += engine.step()
    assert [event.token for event in events] == slowly(random_model(1), [7, 3, 9], 24)


class Again:
    """A graph that runs the forward anew, on what its batch then holds."""

    def __init__(self, model: GPT, batch: FlatBatch) -> None:
        self.model, self.batch = model, batch
        self.hidden_NC = torch.full((batch.tokens_BT.shape[1], model.config.n_embd), math.nan)

    def replay(self) -> None:
        self.batch.forget_biases()
        self.hidden_NC.copy_(self.model(self.batch.tokens_BT, cache=self.batch)[0])


def test_steps_that_decode_go_through_graphs_of_few_shapes(monkeypatch):
    """Rows and pages are padded, and a later step's numbers are put into an earlier one's batch."""
    captured = []

    def capture(graphs: DecodingGraphs, batch: FlatBatch):
        captured.append(Again(graphs.model, batch))
        return SimpleNamespace(batch=batch, graph=captured[-1], hidden_NC=captured[-1].hidden_NC)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(DecodingGraphs, "_capture", capture)
    model = GPT(ModelConfig(sequence_len=200, vocab_size=40, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, smear=True))
    for mine, other in zip(model.parameters(), random_model().parameters()):
        mine.data = other.data
    requests = [request([*prompt, *range(1, 30)], max_new_tokens=20 * n + 1) for n, prompt in enumerate(PROMPTS)]
    engine = Engine(model, max_running=6)
    engine.graphs = DecodingGraphs(model, engine.cache)
    found = complete(engine, requests)
    assert [one.tokens for one in found] == [slowly(model, list(one.prompt), one.max_new_tokens) for one in requests]
    steps = max(len(one.tokens) for one in found)
    assert 4 <= len(captured) < steps / 4


DRAWN = st.tuples(
    st.sampled_from(PROMPTS), st.sampled_from([0.0, 0.7, 1.5]), st.sampled_from([None, 1, 5]), st.integers(0, 3),
    st.integers(1, 12),
)  # fmt: skip


@settings(max_examples=15)
@given(st.lists(DRAWN, min_size=1, max_size=7), st.integers(1, 4))
def test_a_seeded_request_gives_the_same_tokens_in_any_company(drawn, slots):
    model = random_model()
    requests = [
        request(prompt, temperature=temperature, top_k=top_k, seed=seed, max_new_tokens=count)
        for prompt, temperature, top_k, seed, count in drawn
    ]
    together = complete(Engine(model, max_running=slots), requests)
    for one, wanted in zip(together, requests, strict=True):
        assert complete(Engine(model, max_running=1), [wanted])[0] == one


def test_seeds_differ_and_positions_too():
    numbers = {uniform(seed, position) for seed in range(20) for position in range(50)}
    assert len(numbers) == 1000
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 1000 - 0.5) < 0.05
    model = random_model()
    texts = {tuple(complete(Engine(model), [request([5], temperature=1.0, seed=seed)])[0].tokens) for seed in range(5)}
    assert len(texts) == 5


def test_a_request_that_goes_on_where_another_stopped_draws_what_that_would_have():
    model = random_model()
    whole = request([5, 7], temperature=1.0, seed=3, stop_tokens=frozenset())
    tokens = complete(Engine(model), [whole])[0].tokens
    rest = replace(whole, prompt=(5, 7, *tokens[:9]), max_new_tokens=15, continued=9)
    assert complete(Engine(model), [rest])[0].tokens == tokens[9:]
    assert complete(Engine(model), [replace(rest, continued=0)])[0].tokens != tokens[9:]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_sampled_and_others_requests_may(temperature):
    model = random_model()
    free = request([5], temperature=temperature, seed=1, stop_tokens=frozenset())
    said = complete(Engine(model), [free])[0].tokens
    banned = replace(free, logit_bias=dict.fromkeys(said[:2], -math.inf))
    both = complete(Engine(model), [banned, free])
    assert both[1].tokens == said
    assert not set(both[0].tokens) & set(said[:2])


def test_logprobs_are_the_models_own_whatever_moves_the_draws():
    model = random_model()
    asked = request(
        [5, 7], temperature=0.7, top_k=3, logit_bias={2: 9.0}, presence_penalty=1.0, logprobs=2, stop_tokens=frozenset()
    )
    engine, tokens = Engine(model), [5, 7]
    id = engine.add(asked)
    engine.add(replace(asked, logprobs=None))
    for _ in range(24):
        event, other = sorted(engine.step(), key=lambda event: event.id)
        with torch.no_grad():
            expected = model.logits(model(torch.tensor([tokens])))[0, -1].log_softmax(-1)
        assert event.id == id
        assert_likelihood(event.likelihood, event.token, expected, 2)
        assert (other.token, other.likelihood) == (event.token, None)
        tokens.append(event.token)


def assert_likelihood(actual, token: int, expected_V: torch.Tensor, count: int) -> None:
    best = expected_V.topk(count)
    assert actual.logprob == pytest.approx(expected_V[token].item(), abs=1e-5)
    assert [token for token, _ in actual.likeliest] == best.indices.tolist()
    assert [value for _, value in actual.likeliest] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("length", [1, 2, 33, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 300])
def test_a_prompts_own_logprobs_are_those_of_the_full_forward(length):
    model, prompt = long_model(), prompt_of(length)
    with torch.no_grad():
        expected_TV = model.logits(model(torch.tensor([prompt])))[0].log_softmax(-1)
    engine = Engine(model)
    complete(engine, [request(prompt)])  # its pages would be found
    id = engine.add(request(prompt, prompt_logprobs=3))
    while not (events := engine.step()):
        pass
    report = events[0].prompt
    assert events[0].id == id
    assert report.cached_tokens == 0
    assert len(report.likelihoods) == length - 1
    for place, likelihood in enumerate(report.likelihoods):
        assert_likelihood(likelihood, prompt[place + 1], expected_TV[place], 3)
    assert all(event.prompt is None for event in engine.step()), "it comes once"


def test_cached_tokens_are_counted():
    engine = Engine(long_model())
    for expected in (0, 64):
        engine.add(request(prompt_of(70), max_new_tokens=1))
        (event,) = engine.step()
        assert event.prompt == PromptReport(expected)


def test_stop_tokens_wait_for_the_least_length():
    model = random_model()
    free = request([5, 7], temperature=1.0, stop_tokens=frozenset())
    tokens = complete(Engine(model), [free])[0].tokens
    length = tokens.index(tokens[9]) + 1
    asked = replace(free, stop_tokens=frozenset({tokens[9]}))
    assert complete(Engine(model), [replace(asked, min_new_tokens=length - 1)])[0].tokens == tokens[:length]
    longer = complete(Engine(model), [replace(asked, min_new_tokens=length)])[0].tokens
    assert longer[: length - 1] == tokens[: length - 1]
    assert longer[length - 1] != tokens[9]


def test_penalties_count_what_was_said_also_where_a_completion_goes_on():
    model = random_model()
    asked = request(
        [5, 7, 7], frequency_penalty=4.0, repetition_penalty=1.3, max_new_tokens=20, stop_tokens=frozenset()
    )
    tokens = complete(Engine(model), [asked])[0].tokens
    plain = complete(Engine(model), [request([5, 7, 7], max_new_tokens=20, stop_tokens=frozenset())])[0].tokens
    assert len(set(tokens)) > len(set(plain))
    rest = replace(asked, prompt=(5, 7, 7, *tokens[:9]), max_new_tokens=11, continued=9)
    assert complete(Engine(model), [rest])[0].tokens == tokens[9:]
    assert complete(Engine(model), [replace(rest, continued=0)])[0].tokens != tokens[9:]


def spied_tokens(model, monkeypatch) -> list[int]:
    """Note how many tokens each forward computes."""
    counts, forward = [], type(model).forward

    def counted(self, tokens_BT, *arguments, **options):
        counts.append(tokens_BT.numel())
        return forward(self, tokens_BT, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    return counts


def long_model() -> GPT:
    """Longer than a chunk, with short windows of 40 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.config.model.SHORT_WINDOW_MULTIPLE", 40)
        config = ModelConfig(
            sequence_len=400,
            vocab_size=40,
            n_layer=2,
            n_head=2,
            n_kv_head=1,
            n_embd=32,
            window_pattern="SL",
            smear=True,
        )
        assert set(config.windows) != {400}
        model = GPT(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.4)
    return model


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 40, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("length", [31, 32, 33, 64, 65, 127, 128, 129, 300])
def test_a_known_beginning_is_not_computed_again_and_changes_nothing(length, monkeypatch):
    model, stem = long_model(), prompt_of(length)
    engine = Engine(model)
    complete(engine, [request(stem, max_new_tokens=2)])
    counts = spied_tokens(model, monkeypatch)
    again = request([*stem, 7, 8], max_new_tokens=5, stop_tokens=frozenset())
    (hit,) = complete(engine, [again])
    assert counts[0] + sum(counts[1:-4]) == length + 2 - length // PAGE_TOKENS * PAGE_TOKENS
    assert hit == complete(Engine(model), [again])[0]


def test_a_prompt_that_is_known_whole_is_computed_from_its_last_page_on(monkeypatch):
    model, prompt = long_model(), prompt_of(64)
    engine = Engine(model)
    first = complete(engine, [request(prompt)])
    counts = spied_tokens(model, monkeypatch)
    assert complete(engine, [request(prompt)]) == first
    assert counts[0] == 32, "the last token must be computed"


def test_when_pages_run_out_the_newest_is_computed_again_later_and_nothing_changes():
    model = long_model()
    requests = [request(prompt_of(20 + 9 * n, n), max_new_tokens=60, stop_tokens=frozenset()) for n in range(6)]
    expected = [complete(Engine(model), [one])[0] for one in requests]
    engine = Engine(model, cache_tokens=8 * PAGE_TOKENS)
    assert complete(engine, requests) == expected
    assert engine.preemptions > 0
    assert engine.pool.free == 8


def test_a_long_prompt_stalls_no_one():
    """While its chunks are computed, the others get a token at each step."""
    model = long_model()
    engine = Engine(model, step_tokens=140)
    talking = engine.add(request([5], max_new_tokens=50, stop_tokens=frozenset()))
    engine.step()
    long = engine.add(request(prompt_of(3 * CHUNK_TOKENS + 6), max_new_tokens=5, stop_tokens=frozenset()))
    steps = [[event.id for event in engine.step()] for _ in range(5)]
    assert all(talking in ids for ids in steps)
    assert [long in ids for ids in steps] == [False, False, False, True, True]


def test_chunks_end_at_the_same_places_whatever_the_load(monkeypatch):
    model = long_model()
    ends, prompt = [], [39, *prompt_of(349, 99)]
    for company in (0, 20):
        engine, seen = Engine(model), []
        make = engine.cache.batch

        def noted(chunks, seen=seen, make=make):
            cuts = [(one.start, len(one.tokens)) for one in chunks if len(one.tokens) > 1]
            tokens = [list(one.tokens) for one in chunks if len(one.tokens) > 1]
            seen += [cut for cut, one in zip(cuts, tokens) if prompt[cut[0] : sum(cut)] == one]
            return make(chunks)

        monkeypatch.setattr(engine.cache, "batch", noted)
        for number in range(company):
            engine.add(request(prompt_of(9 + number, number), max_new_tokens=30, stop_tokens=frozenset()))
        long = engine.add(request(prompt, max_new_tokens=1))
        while long not in [event.id for event in engine.step()]:
            pass
        ends.append(seen)
    assert ends[0] == ends[1] == [(start, min(CHUNK_TOKENS, 350 - start)) for start in range(0, 350, CHUNK_TOKENS)]


def test_a_thousand_requests_and_aborts_lose_nothing():
    """Every request that is not aborted ends as it would alone; all pages come back."""
    model = random_model()
    draw = random.Random(0)
    engine = Engine(model, max_running=12, cache_tokens=9 * PAGE_TOKENS)
    stems = [draw.choices(range(1, 40), k=40) for _ in range(3)]
    waiting = [
        request(
            [*draw.choice(stems)[: draw.randint(1, 40)], *draw.choices(range(1, 40), k=draw.randint(0, 4))],
            max_new_tokens=draw.randint(1, 16), temperature=draw.choice([0.0, 1.0]), seed=draw.randint(0, 9),
        )
        for _ in range(1000)
    ]  # fmt: skip
    asked, tokens, open_ids, aborted = {}, {}, set(), set()
    while waiting or open_ids:
        for _ in range(min(len(waiting), draw.randint(0, 4))):
            one = waiting.pop()
            asked[id := engine.add(one)] = one
            tokens[id] = []
            open_ids.add(id)
        if open_ids and draw.random() < 0.3:
            gone = draw.choice(sorted(open_ids))
            engine.abort(gone)
            open_ids.discard(gone)
            aborted.add(gone)
        for event in engine.step():
            assert event.id in open_ids
            tokens[event.id].append(event.token)
            if event.finish_reason is not None:
                open_ids.discard(event.id)
    assert engine.pool.free == 9
    assert engine.step() == []
    assert 100 < len(aborted) < 900
    for id in draw.sample(sorted(asked.keys() - aborted), 100):
        assert tokens[id] == complete(Engine(model, max_running=1), [asked[id]])[0].tokens


def test_an_aborted_request_gives_no_more_and_disturbs_no_one():
    model = random_model()
    engine = Engine(model, max_running=2)
    ids = [engine.add(request(prompt, stop_tokens=frozenset())) for prompt in PROMPTS[:4]]
    seen: dict[int, list[int]] = {id: [] for id in ids}
    for number in range(200):
        if number == 3:
            engine.abort(ids[0])
            engine.abort(ids[3])
            engine.abort(999)
        for event in engine.step():
            seen[event.id].append(event.token)
    assert 0 < len(seen[ids[0]]) < 24
    assert seen[ids[3]] == []
    for place in (1, 2):
        alone = complete(Engine(model, max_running=1), [request(PROMPTS[place], stop_tokens=frozenset())])[0]
        assert seen[ids[place]] == alone.tokens
    assert engine.step() == []


def test_what_does_not_fit_a_slot_is_refused_and_the_rest_goes_on():
    engine = Engine(random_model(), max_running=1, longest=10)
    for prompt, count in (([1] * 8, 3), ([], 1), ([1], 0)):
        with pytest.raises(ConfigError, match="max_new_tokens="):
            engine.add(request(prompt, max_new_tokens=count))
    assert len(complete(engine, [request([1] * 8, max_new_tokens=2, stop_tokens=frozenset())])[0].tokens) == 2


TOKENIZER = Tokenizer([], SPLIT_PATTERNS["nanochat"])
END, CALL, CALLED = (TOKENIZER.special(f"<|{name}|>") for name in ("assistant_end", "python_start", "python_end"))
OUTPUT, TOLD = TOKENIZER.special("<|output_start|>"), TOKENIZER.special("<|output_end|>")


class Script:
    """An engine that says a script: for each length of prompt so far the next token."""

    def __init__(self, says: list[int], prompt: int) -> None:
        self.says, self.prompt = says, prompt
        self.requests: dict[int, tuple[Request, int]] = {}
        self.added: list[Request] = []
        self.aborted: list[int] = []

    def add(self, request: Request) -> int:
        self.added.append(request)
        self.requests[len(self.added)] = (request, 0)
        return len(self.added)

    def abort(self, id: int) -> None:
        self.aborted.append(id)
        self.requests.pop(id, None)

    def step(self) -> list[Event]:
        events = []
        for id, (wanted, count) in list(self.requests.items()):
            token = self.says[len(wanted.prompt) + count - self.prompt]
            is_end = token in wanted.stop_tokens | wanted.break_tokens
            reason = "stop" if is_end else "length" if count + 1 == wanted.max_new_tokens else None
            events.append(Event(id, token, reason))
            self.requests[id] = (wanted, count + 1)
            if reason:
                del self.requests[id]
        return events


def spelled(text: str) -> list[int]:
    return list(text.encode())


def run(says: list[int], max_new_tokens: int = 100):
    engine = Script(says, prompt=2)
    loop = ToolLoop(engine, TOKENIZER)
    wanted = Request(prompt=(1, 2), max_new_tokens=max_new_tokens, stop_tokens=frozenset({END}), seed=5)
    (completion,) = complete(loop, [wanted])
    return completion, engine


def test_a_call_is_answered_by_forced_tokens_and_the_model_goes_on():
    told = [OUTPUT, *spelled("5"), TOLD]
    says = [*spelled("So "), CALL, *spelled("2+3"), CALLED, *told, *spelled("5."), END]
    completion, engine = run(says)
    assert completion.tokens == says
    assert completion.is_forced == [False] * 8 + [True] * 3 + [False] * 3
    assert completion.finish_reason == "stop"
    first, second = engine.added
    assert second.prompt == (1, 2, *says[:11])
    assert second.max_new_tokens == 100 - 11
    assert second.continued == 11, "its draws go on where they were"
    assert second.seed == first.seed == 5


def test_an_answer_that_is_continued_after_any_token_is_what_it_would_have_been():
    told = [OUTPUT, *spelled("5"), TOLD]
    says = [*spelled("So "), CALL, *spelled("2+3"), CALLED, *told, *spelled("5."), END]
    for cut in [0, 1, 3, 4, 5, 7, 8, *range(11, len(says))]:
        engine = Script(says, prompt=2)
        rest = Request(
            prompt=(1, 2, *says[:cut]), max_new_tokens=100 - cut, stop_tokens=frozenset({END}), continued=cut
        )
        assert complete(ToolLoop(engine, TOKENIZER), [rest])[0].tokens == says[cut:]
        assert engine.added[0].continued == (11 if cut == 8 else cut), "a call at its end is answered first"
        assert engine.added[-1].max_new_tokens == 100 - (11 if cut < 11 else cut)


def test_the_least_length_does_not_reach_into_a_call():
    """A call ends where the model ends it, also before `min_new_tokens`."""
    model = random_model()
    free = request([5, 7], temperature=1.0, stop_tokens=frozenset())
    tokens = complete(Engine(model), [free])[0].tokens
    asked = replace(free, break_tokens=frozenset({tokens[9]}), min_new_tokens=24)
    completion = complete(Engine(model), [asked])[0]
    assert completion.tokens == tokens[: tokens.index(tokens[9]) + 1]
    assert completion.finish_reason == "stop"


def test_a_request_that_comes_back_from_a_tool_does_not_queue_again():
    model = random_model()
    engine = Engine(model, max_running=1)
    ids = [engine.add(request([5 + number], max_new_tokens=2, stop_tokens=frozenset())) for number in range(4)]
    engine.step()
    back = engine.add(request([9, 9], max_new_tokens=1, continued=1, stop_tokens=frozenset()))
    order = []
    while len(order) < 5:
        order += [event.id for event in engine.step() if event.finish_reason]
    assert order == [ids[0], back, *ids[1:]]


@pytest.mark.parametrize("count", [2, 4, 9])
def test_several_answers_to_one_new_prompt_compute_it_once(count, monkeypatch):
    model = long_model()
    engine, computed, prompt = Engine(model), [], prompt_of(200)
    make = engine.cache.batch
    monkeypatch.setattr(
        engine.cache, "batch", lambda chunks: computed.extend(len(one.tokens) for one in chunks) or make(chunks)
    )
    answers = complete(engine, [request(prompt, max_new_tokens=1, temperature=1.0, seed=n) for n in range(count)])
    assert sum(computed) == 200 + (count - 1) * (200 - 192)
    alone = complete(Engine(model), [request(prompt, max_new_tokens=1, temperature=1.0, seed=count - 1)])[0]
    assert answers[-1] == alone


def test_two_calls_and_a_call_without_a_result():
    no_result = [OUTPUT, *spelled(NO_RESULT), TOLD]
    says = [CALL, *spelled("1+1"), CALLED, OUTPUT, *spelled("2"), TOLD, CALL, *spelled("boom"), CALLED, *no_result, END]
    completion, engine = run(says)
    assert completion.tokens == says
    assert len(engine.added) == 3
    assert run([CALLED, *no_result, END])[0].tokens == [CALLED, *no_result, END], "an end without a start"


def test_the_model_cannot_say_what_the_tool_says():
    says = [CALL, *spelled("2+3"), CALLED, OUTPUT, *spelled("5"), TOLD, END]
    _, engine = run(says)
    assert all(one.logit_bias == {OUTPUT: -math.inf, TOLD: -math.inf} for one in engine.added)


def test_a_model_that_calls_for_ever_is_stopped():
    call = [CALL, *spelled("1+1"), CALLED, OUTPUT, *spelled("2"), TOLD]
    completion, engine = run(call * (MAX_CALLS + 5), max_new_tokens=10_000)
    assert completion.finish_reason == "length"
    assert len(engine.added) == MAX_CALLS + 1
    assert completion.tokens == (call * (MAX_CALLS + 1))[: len(completion.tokens)]


@pytest.mark.parametrize("limit", [1, 4, 5, 6, 7, 8, 9, 10, 11])
def test_the_limit_counts_the_tools_tokens_too(limit):
    says = [CALL, *spelled("2+3"), CALLED, OUTPUT, *spelled("5"), TOLD, *spelled("55"), END]
    completion, _ = run(says, limit)
    assert len(completion.tokens) <= limit
    assert completion.tokens == says[: len(completion.tokens)]
    assert completion.finish_reason == ("stop" if limit == 11 else "length")


def test_abort_reaches_the_engine():
    engine = Script([*spelled("abc"), END], prompt=2)
    loop = ToolLoop(engine, TOKENIZER)
    first = loop.add(Request(prompt=(1, 2), max_new_tokens=9))
    loop.step()
    loop.abort(first)
    assert engine.aborted == [1]
    assert loop.step() == []
