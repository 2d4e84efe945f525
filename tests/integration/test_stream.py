"""The stream through Ray Data: the rows of every step, for any number of workers, from any step."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from nanochat.cluster.stream import StreamSpec, allowed_workers, steps_of
from nanochat.data.row_order import RowReader
from nanochat.data.token_shards import TokenShards
from nanochat.errors import ConfigError
from nanochat.storage import StageFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

NUM_STEPS = 23


def spec_of(tiny_run, folder, slots=4):
    shards = TokenShards.load(str(tiny_run / "shards"))
    return StreamSpec(
        shards=shards, seed=3, rows_per_step=8, num_steps=NUM_STEPS, workers=[slots], folder=StageFolder(str(folder))
    )


def collect(spec, world_size, first_step):
    """Read the stream as `world_size` workers at once; returns {step: rows of all workers} in worker order."""
    import ray.data

    dataset = spec.dataset(first_step)
    dataset.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    splits = dataset.streaming_split(world_size, equal=True)
    found: list[list] = [[] for _ in splits]

    def read(rank):
        for rows in steps_of(splits[rank], spec.slots, world_size):
            if rows.step >= spec.num_steps:
                break
            found[rank].append(rows)

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "a worker hangs"
    return found


@pytest.mark.parametrize(("world_size", "first_step"), [(1, 0), (2, 0), (4, 0), (2, 7)])
def test_rows_of_each_step_are_the_order_whatever_the_workers(
    ray_session, tiny_run, tmp_path, monkeypatch, world_size, first_step
):
    monkeypatch.setattr("nanochat.cluster.stream.UNIT_BYTES", 2048)
    spec = spec_of(tiny_run, tmp_path)
    assert spec.steps_per_unit(NUM_STEPS) > 1, "a unit spans steps"
    found = collect(spec, world_size, first_step)
    reader = RowReader(spec.shards, "train", spec.seed)
    for worker in found:
        assert [rows.step for rows in worker] == list(range(first_step, NUM_STEPS))
    for index, step in enumerate(range(first_step, NUM_STEPS)):
        ids = np.concatenate([worker[index].row_ids for worker in found])
        tokens = np.concatenate([worker[index].rows_BT1 for worker in found])
        expected = reader.order.locate(step * 8, 8)
        order, expected_order = np.argsort(ids), np.argsort(expected)
        np.testing.assert_array_equal(ids[order], expected[expected_order])
        np.testing.assert_array_equal(tokens[order], reader.read(step * 8, 8)[expected_order])


def test_a_finished_run_still_tells_its_step(ray_session, tiny_run, tmp_path):
    spec = spec_of(tiny_run, tmp_path)
    first = next(iter(steps_of(spec.dataset(NUM_STEPS).iterator(), spec.slots, 1)))
    assert first.step == NUM_STEPS


def test_slots_serve_every_allowed_number_of_workers(tiny_run, tmp_path):
    def slots(*arguments):
        return replace(spec_of(tiny_run, tmp_path), workers=allowed_workers(*arguments)).slots

    assert slots(16, 1, 4) == 4
    assert slots(24, 2, 6) == 12
    assert slots(8, 8, 8) == 8
    with pytest.raises(ConfigError, match=r"num_workers=3: must divide the 16 rows of a step. Use 2"):
        allowed_workers(16, 3, 3)


def test_workers_that_do_not_divide_the_slots_are_refused(ray_session, tiny_run, tmp_path):
    spec = spec_of(tiny_run, tmp_path)
    with pytest.raises(ConfigError, match="num_workers=3: must divide the 4 parts"):
        next(steps_of(spec.dataset(0).iterator(), spec.slots, 3))
