"""What a config's flags do in the loop: rates, decay, recomputing, compiling, samples; and that waits are counted."""

import itertools

import pytest
import torch
from tiny_pretraining import tiny_config

from nanochat import storage
from nanochat.inference.completions import complete
from nanochat.inference.engine import Engine
from nanochat.inference.requests import Request
from nanochat.model import gpt
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import StepSchedule
from nanochat.model.scaling import scaled_weight_decay
from nanochat.training import learner, loop
from nanochat.training.checkpoint import Checkpoint, step_folder
from nanochat.training.plan import resolve
from nanochat.training.step import RunningStep, TrainingStep

ONE_STEP = {"num_steps": 1, "evaluate_every": 0, "sample_every": 0, "checkpoint_every": 0}
MATRICES = ("transformer.h.",)


@pytest.mark.parametrize(
    ("flag", "governed"),
    [
        ("matrix_lr", MATRICES),
        ("embedding_lr", ("transformer.wte.", "value_embeds.")),
        ("unembedding_lr", ("lm_head.",)),
        ("scalar_lr", ("resid_lambdas", "x0_lambdas")),
        ("weight_decay", MATRICES),
    ],
)
def test_each_rate_moves_its_parameters_and_no_others(new_run, flag, governed):
    """The first step from one start: with the flag tripled exactly its own parameters end elsewhere."""
    plain, more = (tiny_config(**ONE_STEP, **{flag: value}) for value in (0.1, 0.3))
    before, after = new_run("plain")(plain).model_tensors(), new_run("more")(more).model_tensors()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert moved <= {name for name in before if name.startswith(governed)}
    assert {name for name in moved if name.startswith(governed[0])}


def schedules_of(monkeypatch, run, config) -> list[StepSchedule]:
    run_step, seen = TrainingStep.run, []

    def recorded(step, rows_BT1, schedule, command):
        seen.append(schedule)
        return run_step(step, rows_BT1, schedule, command)

    monkeypatch.setattr(TrainingStep, "run", recorded)
    run(config)
    return seen


def test_every_update_gets_its_own_steps_rate_and_decay(new_run, prepared, monkeypatch):
    """Four steps, the first two of warm-up: decay is the plan's, scaled for batch and horizon, along a cosine."""
    config = tiny_config(num_steps=4, evaluate_every=0, sample_every=0, warmdown_fraction=0.5, weight_decay=0.2)
    seen = schedules_of(monkeypatch, new_run(), config)
    plan = resolve(config, prepared.tokenizer.vocab_size, 32)
    assert plan.weight_decay > 0
    assert plan.weight_decay != config.weight_decay
    shares = [1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    assert [each.muon_weight_decay for each in seen] == pytest.approx([plan.weight_decay * share for share in shares])
    assert [each.lr_factor for each in seen] == pytest.approx([0.5, 1.0, 1.0, 0.5 + 0.5 * 0.05])
    assert scaled_weight_decay(0.2, 2**17, 1, 1) == pytest.approx(0.1)  # of 2^17 tokens, a quarter of the reference


def layers_run(monkeypatch, run, config) -> int:
    """Count how often an MLP runs."""
    with monkeypatch.context() as patch:
        forward, calls = gpt.MLP.forward, itertools.count()

        def counted(mlp, x_BTC):
            next(calls)
            return forward(mlp, x_BTC)

        patch.setattr(gpt.MLP, "forward", counted)
        run(config)
        return next(calls)


def test_recompute_runs_every_layer_once_more_in_each_backward_pass(new_run, monkeypatch):
    plain, recomputing = new_run("plain"), new_run("recomputing")
    config = tiny_config(num_steps=2, evaluate_every=0, sample_every=0, checkpoint_every=0)
    calls = layers_run(monkeypatch, plain, config)
    more = layers_run(monkeypatch, recomputing, tiny_config(**(vars(config) | {"recompute": True})))
    trials, updates = 2, 2 * 2  # backward passes: two to try the micro-batch, two micro-batches in each step
    assert more - calls == config.depth * (trials + updates)
    losses = [
        [record["loss"] for record in storage.read_jsonl(run.folder.metrics) if "loss" in record]
        for run in (plain, recomputing)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize(
    ("compile", "obstacle", "compiles"),
    [("auto", None, True), ("off", None, False), ("auto", "no C++ compiler", False)],
)
def test_the_model_that_trains_is_compiled_where_it_can_be(new_run, monkeypatch, compile, obstacle, compiles):
    compiled, trained = [], []
    backward = TrainingStep.backward

    def recorded(step, rows_BT1, global_tokens):
        trained.append(step.model)
        return backward(step, rows_BT1, global_tokens)

    monkeypatch.setattr(learner, "can_compile", lambda device: obstacle)
    monkeypatch.setattr(GPT, "compile", lambda model: compiled.append(model))
    monkeypatch.setattr(TrainingStep, "backward", recorded)
    run = new_run()
    run(tiny_config(**ONE_STEP, compile=compile))
    assert compiled == ([trained[-1]] if compiles else [])
    assert [record["note"] for record in storage.read_jsonl(run.folder.notes)] == ([obstacle] if obstacle else [])


@pytest.mark.parametrize(
    ("log_every", "evaluate_every", "waits_s", "training_s"),
    [
        (1, 0, [0.25] * 6 + [0], [1] * 6 + [0.75]),
        (3, 0, [0.25, 0.75, 0.5], [1, 3, 2.75]),
        (1, 2, [0.25] * 6 + [0], [1] * 6 + [0.75]),
    ],
)
@pytest.mark.parametrize("is_behind", [True, False])
def test_waits_for_rows_are_counted_as_their_share_of_the_time(
    new_run, monkeypatch, log_every, evaluate_every, waits_s, training_s, is_behind
):
    """On a clock that the test moves: rows take 0.25 s, an update 0.75 s. The first rows come before the clock runs.

    The next rows come while the update runs; who waits for them is seen by whether the update has ended by then.
    """
    now_s = 100.0
    local_stream, run_step = loop.local_stream, TrainingStep.run

    def slow_stream(*arguments):
        nonlocal now_s
        for rows in local_stream(*arguments):
            now_s += 0.25
            yield rows

    def slow_step(step, *arguments):
        nonlocal now_s
        now_s += 0.75
        return run_step(step, *arguments)

    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    monkeypatch.setattr(loop, "local_stream", slow_stream)
    monkeypatch.setattr(TrainingStep, "run", slow_step)
    monkeypatch.setattr(RunningStep, "has_ended", lambda step: is_behind)
    run = new_run()
    run(
        tiny_config(num_steps=7, evaluate_every=evaluate_every, sample_every=0, checkpoint_every=0, log_every=log_every)
    )
    records = [record for record in storage.read_jsonl(run.folder.metrics) if "loss" in record]
    assert [record["step"] for record in records] == list(range(0, 7, log_every))
    if not is_behind:
        waits_s = [0] * len(records)
    assert [record["data_wait_s"] for record in records] == pytest.approx(waits_s)
    shares = [wait_s / lap_s for wait_s, lap_s in zip(waits_s, training_s, strict=True)]
    assert [record["data_wait_share"] for record in records] == pytest.approx(shares)
    assert records[-1]["training_s"] == pytest.approx(0.75 + 6 * 1.0)


def test_samples_are_completions_of_the_model_as_it_is_then(new_run, prepared):
    run, tokenizer = new_run(), prepared.tokenizer
    config = tiny_config(num_steps=4, sample_every=2, sample_tokens=6, seed=5, evaluate_every=0, checkpoint_every=2)
    run(config)
    samples = storage.read_jsonl(run.folder.samples)
    assert [record["step"] for record in samples] == [2, 4]
    for record in samples:
        model = GPT(resolve(config, tokenizer.vocab_size, 32).model)
        model.load_state_dict(Checkpoint(step_folder(run.folder.checkpoints, record["step"])).model_tensors())
        prompts = [(tokenizer.bos, *tokenizer.encode_ordinary(prompt)) for prompt in record["samples"]]
        stop = {"max_new_tokens": 6, "stop_tokens": frozenset({tokenizer.bos}), "temperature": 0.7, "top_k": 40}
        wanted = [Request(prompt=prompt, seed=5 + number, **stop) for number, prompt in enumerate(prompts)]
        tokens = [one.tokens for one in complete(Engine(model, longest=64), wanted)]
        texts = [tokenizer.decode([token for token in said if token != tokenizer.bos]) for said in tokens]
        assert list(record["samples"].values()) == texts
    assert samples[0]["samples"] != samples[1]["samples"]


def test_the_first_worker_notes_its_machine_and_why_this_dtype(new_run):
    run = new_run()
    run(tiny_config(**ONE_STEP))
    machine = storage.read_json(run.folder.machine)
    assert (machine["workers"], machine["dtype"], machine["dtype_reason"]) == (1, "float32", "asked for")
    assert machine["cores"] == 1
