"""Fine-tuning: conversations do not see each other, the loss is over what the assistant says, resume is exact."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_sft
import torch
import worker_group
from test_step import random_model
from tiny_sft import SEQUENCE_LEN, TOKENIZER, SftRun

from nanochat.config.sft import SftConfig
from nanochat.data.conversations import Part, exchange, render, supervised
from nanochat.errors import CheckpointError, ConfigError, TokenizerMismatchError
from nanochat.model.optimizer import StepSchedule
from nanochat.run_context import RunContext
from nanochat.storage import read_jsonl
from nanochat.tasks.task import ListedTask
from nanochat.training import sft
from nanochat.training.checkpoint import step_folder
from nanochat.training.sft import FineTuning, resolve_sft
from nanochat.training.step import TrainingStep, document_numbers

A = exchange(
    "What is 2+3?", [Part("text", "So "), Part("python", "2+3"), Part("python_output", "5"), Part("text", "5")]
)
B = exchange("Who are you?", "I am a model.")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tiny_sft.prepare_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def new_run(base, tmp_path, on_one_core):
    def make(name: str = "run", count: int = 80) -> SftRun:
        root = tmp_path / name
        root.mkdir()
        return SftRun(root, base, tiny_sft.write_conversations(root / "c.jsonl", count))

    return make


def model_of_bytes(seed: int = 0):
    """A model with every part on, and windows shorter than the row."""
    return random_model(seed, sequence_len=64, vocab_size=TOKENIZER.vocab_size, window_pattern="S", smear=True)


def row_of(*conversations, length: int = 96) -> np.ndarray:
    ids = [token for conversation in conversations for token in render(TOKENIZER, conversation)]
    return np.array([*ids, *[TOKENIZER.bos] * (length - len(ids))])[None]


def step_with(model, micro_batch_rows: int = 8, world_size: int = 1) -> TrainingStep:
    def says(rows):
        return supervised(TOKENIZER, rows)

    optimizer = SimpleNamespace(world_size=world_size, reduce_in_backward=lambda: None, step=lambda schedule: None)
    return TrainingStep(
        model, optimizer, tokenizer=TOKENIZER, document_masking=True, micro_batch_rows=micro_batch_rows, supervised=says
    )


def test_a_conversation_cannot_see_its_neighbours_in_a_row():
    model = model_of_bytes()
    changed = exchange("What is 9*9?", [Part("text", "Oh "), Part("python", "9*9"), Part("python_output", "8"),
                                        Part("text", "8")])  # fmt: skip
    first, second = row_of(A, B), row_of(changed, B)
    assert first.shape == second.shape
    logits = []
    for row in (first, second):
        tokens_1T = torch.from_numpy(row[:, :-1])
        with torch.no_grad():
            hidden = model(tokens_1T, document_BT=document_numbers(tokens_1T, TOKENIZER.bos))
        logits.append(model.logits(hidden)[0])
    start = len(render(TOKENIZER, A))
    assert not torch.equal(logits[0][:start], logits[1][:start])
    assert torch.equal(logits[0][start:], logits[1][start:])


def test_the_loss_of_a_packed_row_is_the_sum_of_its_conversations_alone():
    model = model_of_bytes()
    together = float(step_with(model).backward(row_of(A, B), global_tokens=1))
    alone = [float(step_with(model).backward(row_of(one), global_tokens=1)) for one in (A, B)]
    assert together == pytest.approx(sum(alone), rel=1e-6)
    assert min(alone) > 1


def naive_loss(model, *conversations) -> float:
    """Mean nats of the supervised tokens, conversation by conversation, from plain logits."""
    nats, count = 0.0, 0
    for conversation in conversations:
        ids = torch.tensor([render(TOKENIZER, conversation)])
        mask = supervised(TOKENIZER, ids.numpy())[0]
        with torch.no_grad():
            log_probabilities = model.logits(model(ids)).log_softmax(-1)[0]
        for place in range(1, ids.shape[1]):
            if mask[place]:
                nats -= float(log_probabilities[place - 1, ids[0, place]])
                count += 1
    return nats / count


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4])
def test_the_loss_is_a_mean_over_supervised_tokens_whatever_the_micro_batch(micro_batch_rows):
    """Rows with few and many supervised tokens weigh by tokens, not by rows; a row without any is no NaN."""
    model = model_of_bytes()
    rows = np.concatenate([row_of(A, B), row_of(A), row_of(B), row_of()])
    schedule = StepSchedule(lr_factor=0.0, muon_momentum=0.9, muon_weight_decay=0.0)
    result = step_with(model, micro_batch_rows).run(rows, schedule).result()
    assert result.loss == pytest.approx(naive_loss(model, A, B, A, B), rel=1e-5)


def test_gradients_do_not_depend_on_the_micro_batch():
    rows = np.concatenate([row_of(A, B), row_of(A), row_of(B), row_of()])
    gradients = []
    for size in (1, 4):
        model = model_of_bytes()
        step_with(model, size).run(rows, StepSchedule(lr_factor=0.0, muon_momentum=0.9, muon_weight_decay=0.0))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)
        assert gradient.abs().max() > 0, name


def test_rows_without_anything_to_learn_give_zero_not_nan():
    model = model_of_bytes()
    schedule = StepSchedule(lr_factor=0.0, muon_momentum=0.9, muon_weight_decay=0.0)
    assert step_with(model).run(row_of(), schedule).result().loss == 0.0


def test_an_interrupted_run_ends_with_the_same_bits(new_run, monkeypatch):
    whole, broken = new_run("whole"), new_run("broken")
    expected = whole(whole.config())
    config = broken.config()
    run_step = TrainingStep.run
    calls = []

    def dying(self, *arguments, **options):
        calls.append(1)
        if len(calls) in (4, 7):  # in the fourth step, and in the fifth after the resume from step 2
            raise RuntimeError("lost")
        return run_step(self, *arguments, **options)

    monkeypatch.setattr(TrainingStep, "run", dying)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="lost"):
            broken(config)
    resumed = broken(config)
    assert broken.losses() == whole.losses()
    before, after = expected.model_tensors(), resumed.model_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows = [read_jsonl(str(run.root / "sft" / "rows_00.jsonl")) for run in (whole, broken)]
    by_step = [{record["step"]: record["row_ids"] for record in of_run} for of_run in rows]
    assert by_step[0] == by_step[1]


def test_two_workers_compute_what_one_does(new_run, tmp_path):
    run = new_run()
    run(run.config(sample_every=0, checkpoint_every=0, num_steps=1))  # packs the shards
    one, two = (
        worker_group.run_group(
            workers, tmp_path / f"group{workers}", tiny_sft.finetune_as_worker, str(root), run.base.folder,
            str(run.conversations),
        )[0]
        for workers, root in ((1, copied(run, tmp_path / "one")), (2, copied(run, tmp_path / "two")))
    )  # fmt: skip
    one = {int(step): loss for step, loss in one.items()}
    two = {int(step): loss for step, loss in two.items()}
    assert one.keys() == two.keys() == set(range(6))
    assert max(abs(one[step] - two[step]) for step in one) < 1e-5


def copied(run: SftRun, root):
    """A root with the run's shards and nothing else."""
    import shutil

    root.mkdir()
    shutil.copytree(run.root / "shards", root / "shards")
    return root


def test_what_is_not_given_is_the_base_models(new_run, base):
    run = new_run()
    plain = resolve_sft(run.config(), base, rows_per_epoch=100)
    assert plain.plan.rows_per_step == 4
    assert plain.rates.matrix == base.state["rates"]["matrix"]
    assert plain.inherited.keys() == {"matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "global_batch_tokens"}
    assert plain.plan.lr_factor == base.state["plan"]["lr_factor"]
    given = resolve_sft(
        run.config(matrix_lr=0.5, global_batch_tokens=SEQUENCE_LEN, num_steps=None, num_epochs=2),
        base,
        rows_per_epoch=100,
    )
    assert given.rates.matrix == 0.5
    assert "matrix_lr" not in given.inherited
    assert (given.plan.rows_per_step, given.plan.num_steps) == (1, 200)
    with pytest.raises(ConfigError, match=r"global_batch_tokens=161: must be a multiple of the row's 160"):
        resolve_sft(run.config(global_batch_tokens=161), base, 100)


def test_it_begins_with_the_base_models_weights_and_moments(new_run, base):
    """Without a learning rate the weights stay; warm moments are the base model's after decaying once."""
    run = new_run()
    checkpoint = run(run.config(first_lr_factor=0.0, num_steps=1, sample_every=0, evaluate_every=0))
    before, after = base.model_tensors(), checkpoint.model_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    name = next(name for name in before if name.endswith("mlp.c_fc.weight"))
    rows = before[name].shape[0]

    def momentum(of, run=None):
        wanted = {f"{name}/momentum/0/{rows}": torch.zeros_like(before[name])}
        of.optimizer_tensors(wanted)
        return next(iter(wanted.values()))

    warm = momentum(checkpoint)
    cold_run = new_run("cold")
    cold = momentum(cold_run(cold_run.config(first_lr_factor=0.0, num_steps=1, sample_every=0, evaluate_every=0,
                                             warm_start=False)))  # fmt: skip
    torch.testing.assert_close(warm - cold, 0.9 * momentum(base), rtol=1e-4, atol=1e-7)


def test_it_learns_to_answer_and_is_scored_on_the_way(new_run):
    run = new_run()
    run.conversations.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": f"{n} x"},
                                         {"role": "assistant", "content": "yes"}]}) + "\n" for n in range(80))
    )  # fmt: skip
    checkpoint = run(run.config(num_steps=40, matrix_lr=2.0, embedding_lr=30.0, evaluate_every=20, sample_every=40))
    losses, scores = run.losses(), [r["val_bpb"] for r in run.records() if "val_bpb" in r]
    assert losses[39] < 0.2 * losses[0]
    assert scores[-1] < 0.2 * scores[0]
    assert checkpoint is not None
    samples = read_jsonl(str(run.root / "sft" / "samples.jsonl"))[-1]["samples"]
    assert "yes" in samples.values()


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.8), (5, 0.8), (6, 0.8 * 4 / 5), (8, 0.8 * 2 / 5), (9, 0.8 / 5), (10, 0.0)]
)
def test_the_learning_rate_is_constant_and_then_falls_to_zero(step, factor):
    config = SftConfig(first_lr_factor=0.8, warmdown_fraction=0.5, weight_decay=0.25)
    schedule = FineTuning.schedule(SimpleNamespace(config=config, plan=SimpleNamespace(num_steps=10)), step)
    assert schedule.lr_factor == pytest.approx(factor)
    assert (schedule.muon_momentum, schedule.muon_weight_decay) == (0.9, 0.25)


class Parity(ListedTask):
    """Ten problems; of a made-up judge the even ones are right."""

    kind = "generate"


@pytest.mark.parametrize("rank", [0, 1])
def test_held_out_problems_are_put_to_the_model_every_worker_its_share(rank, monkeypatch):
    asked = []

    def judged(model, tokenizer, task, indices):
        asked.append(list(indices))
        return [SimpleNamespace(is_right=index % 4 == 0) for index in indices]

    def reduced(right):
        right += 2.0  # of the other worker

    monkeypatch.setattr(sft, "judge", judged)
    monkeypatch.setattr(sft, "inference_copy", lambda model: model)
    monkeypatch.setattr(sft, "dist", SimpleNamespace(all_reduce=reduced))
    monkeypatch.setattr(sft, "answer", lambda *_, **__: [SimpleNamespace(shown="x")] * 3)
    written = []
    unscored = Parity("notes", "train", [A] * 3)
    unscored.kind = "unscored"
    loop = SimpleNamespace(
        context=RunContext(rank=rank, world_size=2), model=None, tokenizer=TOKENIZER, config=SftConfig(chat_problems=9),
        held_out=[Parity("parity", "val", [A] * 20), unscored, Parity("few", "val", [A] * 4)],
        hardware=SimpleNamespace(device=torch.device("cpu")),
        metrics=SimpleNamespace(write=written.append, write_samples=lambda *_: None),
    )  # fmt: skip
    monkeypatch.setattr(sft, "SAMPLE_QUESTIONS", ())
    FineTuning.sample(loop, 7)
    shares = [list(range(rank, 9, 2)), list(range(rank, 4, 2))]
    assert asked == shares
    rights = [sum(index % 4 == 0 for index in share) for share in shares]
    assert written == [{"step": 7, "chat_parity": (rights[0] + 2) / 9, "chat_few": (rights[1] + 2) / 4}]


def test_another_base_model_is_refused(new_run, base, tmp_path):
    import shutil

    run = new_run()
    run(run.config(num_steps=2))
    other = tmp_path / "other"
    shutil.copytree(base.folder, other / "step_000002")
    checksums = other / "step_000002" / "checksums_00_of_01.json"
    checksums.write_text(checksums.read_text().replace('"model.safetensors": "', '"model.safetensors": "0'))
    run.base = replace(base, folder=step_folder(str(other), 2))
    with pytest.raises(CheckpointError, match="began from"):
        run(run.config(num_steps=4))


def test_a_base_model_of_another_tokenizer_is_refused(new_run, base, tmp_path):
    import shutil

    run = new_run()
    folder = tmp_path / "stranger" / "step_000002"
    shutil.copytree(base.folder, folder)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"tokenizer_hash": "0" * 64}))
    run.base = replace(base, folder=str(folder))
    with pytest.raises(TokenizerMismatchError, match="was trained with another tokenizer"):
        run(run.config())


def test_a_fine_tuned_model_can_be_the_base_of_another(new_run):
    first, second = new_run("first"), new_run("second")
    second.base = first(first.config(num_steps=1, matrix_lr=0.5))
    plan = resolve_sft(second.config(), second.base, 100)
    assert plan.rates.matrix == 0.5
    assert second(second.config(num_steps=2)).state["updates"] == 2 + 1 + 2


def test_a_base_that_does_not_say_how_it_was_trained_is_refused(new_run):
    run = new_run()
    checkpoint = run(run.config(num_steps=1))
    path = run.root / "sft/checkpoints/step_000001/state.json"
    state = json.loads(path.read_text())
    del state["rates"]
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="does not say rates"):
        resolve_sft(run.config(), checkpoint, 100)
