"""Two and four workers over gloo compute what one does, and load each other's checkpoints."""

import pytest
import torch
import worker_group
from safetensors.torch import load_file
from tiny_pretraining import pretrain_as_worker, tiny_config


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers") / "one"
    return folder, worker_group.run_workers(1, folder)[0]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def several(request, one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers") / str(request.param)
    return folder, worker_group.run_workers(request.param, folder, f"{one[0]}/checkpoints")


def test_from_random_parameters_the_losses_are_those_of_one_worker(one, several):
    for outcome in several[1]:
        assert outcome["randomised"] == pytest.approx(one[1]["randomised"], abs=1e-5)


def test_from_the_default_initialisation_they_stay_close_through_the_warm_up(one, several):
    for outcome in several[1]:
        assert outcome["default"] == pytest.approx(one[1]["default"], abs=1e-4)


def test_gradients_of_one_step_are_those_of_one_worker(one, several):
    """After the first update the first moments are the gradients times a constant."""
    expected = load_file(one[0] / "state_0.safetensors")
    rows = {key.rsplit("/", 2)[0]: tensor for key, tensor in expected.items()}
    covered = dict.fromkeys(rows, 0)
    for rank in range(len(several[1])):
        for key, tensor in load_file(several[0] / f"state_{rank}.safetensors").items():
            name, lo, hi = key.rsplit("/", 2)
            covered[name] += int(hi) - int(lo)
            if name.endswith(("exp_avg", "momentum")):
                part = rows[name][int(lo) : int(hi)]
                assert (tensor - part).norm() <= 1e-6 * rows[name].norm(), key
    assert covered == {name: len(tensor) for name, tensor in rows.items()}


def test_all_workers_hold_the_same_parameters_bit_for_bit(several):
    first = load_file(several[0] / "parameters_0.safetensors")
    for rank in range(1, len(several[1])):
        for name, tensor in load_file(several[0] / f"parameters_{rank}.safetensors").items():
            assert torch.equal(tensor, first[name]), name


def test_the_optimizer_state_is_shared_out(one, several):
    whole = sum(tensor.numel() for tensor in load_file(one[0] / "state_0.safetensors").values())
    for rank in range(len(several[1])):
        own = sum(tensor.numel() for tensor in load_file(several[0] / f"state_{rank}.safetensors").values())
        assert own < 1.3 * whole / len(several[1])


def test_a_checkpoint_of_one_worker_goes_on_on_several(one, several):
    for outcome in several[1]:
        assert outcome["resumed"] == pytest.approx(one[1]["continued"], abs=1e-5)


@pytest.mark.parametrize("reads", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_checkpoint_of_several_workers_goes_on_on_another_number(several, reads, tmp_path):
    outcomes = worker_group.run_workers(reads, tmp_path / "read", f"{several[0]}/checkpoints", train=False)
    for outcome in outcomes:
        assert outcome["resumed"] == pytest.approx(several[1][0]["continued"], abs=1e-5)
    if reads == len(several[1]):
        assert outcomes[0]["resumed"] == several[1][0]["continued"]


def test_one_worker_resumes_bit_for_bit(one, tmp_path):
    outcome = worker_group.run_workers(1, tmp_path / "again", f"{one[0]}/checkpoints", train=False)[0]
    assert outcome["resumed"] == one[1]["continued"]


def test_validation_of_two_workers_scores_what_one_scores(prepared, on_one_core, tmp_path):
    """18 rows in batches of four: one worker has three of the five batches, the last of them half padding."""
    prepared.tokenizer.save(str(tmp_path / "tokenizer"))
    config = tiny_config(
        num_steps=2, evaluate_every=2, sample_every=0, checkpoint_every=0, micro_batch_rows=4, validation_tokens=18 * 32
    )
    assert prepared.shards.rows("validation") > 18
    arguments = (str(tmp_path / "tokenizer"), prepared.shards.folder, config)
    records = [
        worker_group.run_group(workers, tmp_path / str(workers), pretrain_as_worker, *arguments)[0]
        for workers in (1, 2)
    ]
    one, two = ([record["val_bpb"] for record in of_run if "val_bpb" in record] for of_run in records)
    assert len(one) == 2
    assert two == pytest.approx(one, rel=1e-6)
    one, two = ([record["loss"] for record in of_run if "loss" in record] for of_run in records)
    assert two == pytest.approx(one, rel=1e-5)
