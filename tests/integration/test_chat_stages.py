"""Fine-tuning and evaluation on a real Ray: kills change no number, and neither does the number of actors."""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
from ray import cloudpickle
from test_pretraining import assert_same_run, losses, notes_of

from nanochat.config.cluster import ClusterConfig
from nanochat.config.evaluation import EvaluationConfig
from nanochat.config.sft import SftConfig
from nanochat.errors import ClusterError
from nanochat.evaluation.evaluate import Evaluator, Item, Model, evaluate
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder, StageFolder, read_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def run_dir(tiny_base, tmp_path_factory) -> Path:
    """A run directory with a base model and a file of short conversations."""
    root = tmp_path_factory.mktemp("chat") / "run"
    shutil.copytree(tiny_base, root)
    draw = random.Random(0)
    with open(root / "chats.jsonl", "w") as file:
        for number in range(120):
            question = f"{number} " + "x" * draw.randint(1, 12)
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "y" * draw.randint(1, 9)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return root


@pytest.fixture
def finetune(ray_session, run_dir):
    """Fine-tune on Ray into a folder and return its checkpoint."""
    from nanochat.cluster.session import ray_context
    from nanochat.cluster.trainer import sft_worker, train_on_ray
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.tasks.mixture import MixtureSource, load_mixture
    from nanochat.tasks.mixture_shards import write_mixture_shards
    from nanochat.training.checkpoint import newest_of
    from nanochat.training.sft import resolve_sft

    def train(folder, kills=None, marks=None, **changes):
        from faulty_worker import worker_with

        fields = {
            "mixture": (f"messages={run_dir}/chats.jsonl",), "num_steps": 12, "global_batch_tokens": 4 * 64,
            "dtype": "float32", "compile": "off", "evaluate_every": 6, "sample_every": 0, "checkpoint_every": 4,
            "sample_tokens": 4, "log_every": 1, "log_row_ids": True, "micro_batch_rows": 2,
        }  # fmt: skip
        config = SftConfig(**(fields | changes))
        place = RunFolder(str(run_dir))
        source, base = MixtureSource(config, place.tasks), newest_of(place.pretrain, print)
        tokenizer = Tokenizer.load(place.tokenizer)
        shards = write_mixture_shards(source, ray_context(lambda line: None), tokenizer, 64, place.sft_shards)

        def plain(job):
            sft_worker(load_mixture(source).held_out, base, job)

        worker = plain if kills is None else worker_with(kills, marks, plain)
        cluster = ClusterConfig(num_workers=2, cpus_per_worker=0.5, max_failures=5)
        plan = resolve_sft(config, base, shards.rows("train")).plan
        return train_on_ray(
            config, plan, cluster, shards, place.tokenizer, StageFolder(str(folder)), lambda: None, worker
        )

    return train


def test_kills_of_fine_tuning_change_nothing(finetune, tmp_path):
    """Kill -9 in a step, during a checkpoint, just after one: losses, rows, weights, optimiser bit for bit."""
    from faulty_worker import Kill

    assert finetune(tmp_path / "calm") is not None
    marks = tmp_path / "marks"
    marks.mkdir()
    kills = [Kill("step", rank=1, count=6), Kill("write", rank=0, count=1), Kill("after_save", rank=1, count=1)]
    assert finetune(tmp_path / "killed", kills, marks) is not None
    assert len(list(marks.iterdir())) == 3, "every kill happened"
    assert len([note for note in notes_of(tmp_path / "killed") if "failed: " in note]) >= 3
    assert_same_run(tmp_path / "killed", tmp_path / "calm", 12)
    bits = [
        [record["val_bpb"] for record in read_jsonl(f"{folder}/metrics.jsonl") if "val_bpb" in record]
        for folder in (tmp_path / "calm", tmp_path / "killed")
    ]
    assert bits[0] == bits[1]
    assert len(bits[0]) == 3
    got = losses(tmp_path / "calm")
    assert got[11] < got[0]


class DyingEvaluator(Evaluator):
    """Dies with SIGKILL in the middle of chosen items, once each."""

    marks: Path

    def __reduce__(self):
        _, arguments = super().__reduce__()
        return revived, (self.marks, arguments)

    def __call__(self, item: Item):
        mark = self.marks / f"{item.task}_{item.first}"
        result = super().__call__(item)
        if item.first == 20 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def revived(marks: Path, arguments) -> DyingEvaluator:
    evaluator = DyingEvaluator(*arguments)
    evaluator.marks = marks
    return evaluator


def scores(found: dict) -> dict:
    """What is compared: everything but where and how it was computed."""
    return {
        name: {key: value for key, value in of_model.items() if key != "config"} for name, of_model in found.items()
    }


def write_bundle(folder: Path) -> str:
    """An evaluation bundle of one task of thirty questions."""
    task = "label: letters, dataset_uri: local_data/x.jsonl, num_fewshot: [2], icl_task_type: multiple_choice"
    (folder / "eval_data").mkdir(parents=True)
    (folder / "tasks.yaml").write_text(f"icl_tasks:\n- {{{task}}}\n")
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nletters,50\n")
    rows = [{"query": f"{n} " + "x" * (n % 7), "choices": ["red", "a blue one"], "gold": n % 2} for n in range(30)]
    (folder / "eval_data" / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_neither_actors_nor_their_deaths_change_a_score(ray_session, run_dir, tmp_path, monkeypatch):
    from nanochat.cluster.session import actor_map
    from nanochat.evaluation import evaluate as stage
    from nanochat.training.checkpoint import newest_of

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(stage, "PROBLEMS_OF_ITEM", 20)
    config = EvaluationConfig(
        models=("pretrain",), tasks=("spelling", "identity"), max_per_task=45, max_new_tokens=12, bits_per_byte=True,
        samples=2, temperature=1.0, dtype="float32", core=write_bundle(tmp_path / "bundle"),
    )  # fmt: skip
    models = [Model("pretrain", newest_of(RunFolder(str(run_dir)).pretrain, print).folder)]

    def result_of(run, kind=Evaluator):
        evaluator = kind(config, run, str(run_dir), models)
        evaluator.marks = tmp_path / "marks"
        return scores(evaluate(evaluator, run))

    alone = result_of(RunContext(use_gpu=False))
    one = result_of(RunContext(use_gpu=False, map=actor_map(1, 0.0)))
    two = result_of(RunContext(use_gpu=False, map=actor_map(2, 0.0)))
    (tmp_path / "marks").mkdir()
    dying = result_of(RunContext(use_gpu=False, map=actor_map(2, 0.0)), DyingEvaluator)
    assert len(list((tmp_path / "marks").iterdir())) == 3, "one died in the second item of each task"
    assert alone == one == two == dying
    found = alone["pretrain"]
    assert found["chat"]["spelling"]["n"] == 45
    assert 0 <= found["chat"]["identity"]["pass_at_1"] <= found["chat"]["identity"]["pass_at_2"] <= 1
    trained = [record["val_bpb"] for record in read_jsonl(f"{run_dir}/pretrain/metrics.jsonl") if "val_bpb" in record]
    assert found["bits_per_byte"] == pytest.approx(trained[-1], rel=1e-6), "as training measured the same checkpoint"
    letters = found["core"]["tasks"]["letters"]
    assert letters["n"] == 30
    assert letters["centered"] == pytest.approx((letters["accuracy"] - 0.5) / 0.5)
    assert found["core"]["title"] == "CORE on 1 of 22 tasks"


def test_an_error_in_an_item_comes_out_as_it_was(ray_session):
    from nanochat.cluster.session import actor_map

    def fails(item):
        if item == 3:
            raise KeyError("no such problem")
        return item

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(KeyError, match="no such problem") as caught:
        list(actor_map(2, 0.0)(fails, range(6)))
    assert "in an actor" in caught.value.__notes__[0]
    assert list(actor_map(2, 0.0)(abs, [-3, 2, -1])) == [3, 2, 1]
    with pytest.raises(ClusterError, match=r"actors=99: needs 49.5 CPU, the cluster has \d+\. Ask for fewer --actors"):
        list(actor_map(99, 0.0)(abs, [1]))
