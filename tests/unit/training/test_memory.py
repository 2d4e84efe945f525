"""Memory by calculation against what torch allocates, the micro-batch that it allows, and what it refuses."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_pretraining import tiny_config
from torch.profiler import ProfilerActivity, profile

from nanochat import storage
from nanochat.config.pretrain import PretrainConfig
from nanochat.errors import ConfigError
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import MuonAdamW, StepSchedule, cut_into_pieces
from nanochat.model.scaling import parameter_groups
from nanochat.run_context import RunContext
from nanochat.storage import StageFolder
from nanochat.training import learner
from nanochat.training.hardware import Hardware, multiplies_bfloat16
from nanochat.training.memory import GIB, Memory, training_memory
from nanochat.training.plan import MAX_MICRO_BATCH_TOKENS, learning_rates, micro_batch_rows, resolve_model
from nanochat.training.pretrain import Pretraining

GB = 10**9
HALF, FULL = torch.bfloat16, torch.float32


def allocated_peak(work) -> int:
    """Return the most bytes that were allocated at once while `work` ran, beside what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    kineto = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in kineto if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    assert most > 0, "the profiler says what is allocated"
    return most


class Trained:
    """A model whose gradients are there, as from the second micro-batch on."""

    def __init__(self, depth: int, sequence_len: int, vocab_size: int, dtype: torch.dtype, recompute: bool) -> None:
        self.config = resolve_model(PretrainConfig(depth=depth, head_dim=64), vocab_size, sequence_len)
        self.model = GPT(self.config, dtype)
        self.model.initialize(torch.Generator().manual_seed(0))
        self.model.recompute = recompute
        names = dict(self.model.named_parameters())
        groups = parameter_groups(self.config, list(names), learning_rates(PretrainConfig()), 1.0)
        self.optimizer = MuonAdamW(names, groups, muon_dtype=dtype)
        self.memory = training_memory(
            self.config, world_size=1, device="cpu", dtype=dtype, compiled=False, recompute=recompute
        )
        self.backward(1)

    def backward(self, rows: int) -> None:
        tokens = torch.zeros(rows, self.config.sequence_len, dtype=torch.int64)
        (self.model.loss(tokens, tokens) / 2).backward()

    def update(self) -> None:
        self.optimizer.step(StepSchedule(lr_factor=0.1, muon_momentum=0.9, muon_weight_decay=0.1))


SHAPES = [
    (2, 256, 256, FULL, False, 2),
    (3, 512, 16_384, FULL, True, 2),
    (4, 512, 512, HALF, False, 4),
    (4, 512, 512, HALF, True, 4),
    (4, 512, 16_384, HALF, False, 2),
    (4, 512, 512, FULL, False, 2),
    (6, 1024, 512, HALF, True, 2),
    pytest.param((6, 1024, 512, HALF, False, 2), marks=pytest.mark.slow),
    pytest.param((6, 1024, 512, FULL, False, 2), marks=pytest.mark.slow),
    pytest.param((5, 256, 8192, HALF, False, 8), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_peak_is_near_what_is_allocated(shape):
    """Tolerance: 5 % below, where the plan would not fit, and 15 % above, which only leaves some rows unused.

    Measured: 0 to 11 % above. What is too much is a layer's gradients, not all there at once, and in float32 keys and
    values that blocked attention need not copy.
    """
    depth, sequence_len, vocab_size, dtype, recompute, rows = shape
    if dtype == HALF and not multiplies_bfloat16(torch.device("cpu")):
        pytest.skip("bfloat16 is emulated on this CPU, which takes minutes")
    trained = Trained(depth, sequence_len, vocab_size, dtype, recompute)
    measured = allocated_peak(lambda: trained.backward(rows))
    planned = trained.memory.peak(rows) - trained.memory.fixed
    print(f"{shape}: {planned / 1e6:.1f} MB planned, {measured / 1e6:.1f} MB allocated, {planned / measured:.3f}")
    assert 0.95 < planned / measured < 1.15


def test_weights_gradients_optimizer_and_update_are_what_is_allocated():
    trained = Trained(4, 128, 512, HALF, False)
    parameters = list(trained.model.parameters())
    assert trained.memory.weights == sum(p.nbytes for p in parameters)
    assert trained.memory.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    state = sum(tensor.nbytes for tensor in trained.optimizer.state_tensors().values())
    assert state == pytest.approx(trained.memory.optimizer, rel=0.01)
    assert allocated_peak(trained.update) == pytest.approx(trained.memory.update, rel=0.02)


def test_the_optimizer_is_shared_as_its_pieces_are():
    """Matrices are not cut, so one of eight workers has up to one of them more: 2 % here."""
    config = resolve_model(PretrainConfig(depth=24), 32_768, 2048)
    with torch.device("meta"):
        parameters = dict(GPT(config).named_parameters())
    groups = parameter_groups(config, list(parameters), learning_rates(PretrainConfig()), 1.0)
    kinds = {name: group.kind for group in groups for name in group.names}
    own = [0] * 8
    for piece in cut_into_pieces({name: p.shape for name, p in parameters.items()}, groups, 8):
        rows = piece.hi - piece.lo
        own[piece.owner] += (4 if kinds[piece.name] == "muon" else 8) * rows * parameters[piece.name][0].numel()
    planned = training_memory(config, world_size=8, device="cuda", dtype=HALF, compiled=True, recompute=False)
    assert max(own) == pytest.approx(planned.optimizer, rel=0.03)


@cache
def on_gpu(depth: int, vocab_size: int = 32_768, world_size: int = 1, recompute: bool = False) -> Memory:
    model = resolve_model(PretrainConfig(depth=depth), vocab_size, 2048)
    return training_memory(model, world_size=world_size, device="cuda", dtype=HALF, compiled=True, recompute=recompute)


def test_depth_12_is_near_what_an_h200_had_at_most():
    """27.1 GiB by torch's allocator, 32 compiled rows of 2,048 (torch 2.11, 2026-11-27)."""
    assert on_gpu(12).peak(32) / GIB == pytest.approx(27.1, rel=0.02)


def rows_for(memory: Memory, free_bytes: float, *, rows: int = 1024, device: str = "cuda", **changes) -> int:
    model = resolve_model(PretrainConfig(depth=12), 32_768, 2048)
    return micro_batch_rows(
        PretrainConfig(**changes), model, memory, rows=rows, device=device, free_bytes=int(free_bytes)
    )


@pytest.mark.parametrize(
    ("depth", "device_bytes", "workers", "rows", "rows_of_65536"),
    [(8, 12 * GB, 1, 15, 5), (12, 24 * GB, 1, 17, 10), (24, 80 * GIB, 8, 18, 15), (26, 80 * GIB, 8, 15, 12)],
)
def test_the_presets_fit_their_gpus(depth, device_bytes, workers, rows, rows_of_65536):
    """Rows of 2,048 at once, compiled; CUDA itself has 1 GiB of the device."""
    found = [rows_for(on_gpu(depth, vocab, workers), device_bytes - GIB) for vocab in (32_768, 65_536)]
    assert found == [rows, rows_of_65536]


@given(st.integers(0, 200 * GB), st.integers(0, 200 * GB), st.sampled_from(["cpu", "cuda", "mps"]), st.booleans())
def test_more_memory_never_means_fewer_rows(one, other, device, recompute):
    memory = on_gpu(12, recompute=recompute)
    less, more = (rows_for(memory, size, device=device) for size in sorted((one, other)))
    assert 1 <= less <= more <= MAX_MICRO_BATCH_TOKENS[device] // 2048


def test_what_else_moves_the_micro_batch():
    assert rows_for(on_gpu(12), 0) == 1
    assert rows_for(on_gpu(12), 500 * GB) == 32
    assert rows_for(on_gpu(12), 500 * GB, device="cpu") == 4
    assert rows_for(on_gpu(12), 500 * GB, rows=3) == 3
    assert 1 < rows_for(on_gpu(12), 12 * GB) < rows_for(on_gpu(12, recompute=True), 12 * GB)
    assert rows_for(on_gpu(12), 8 * GB) < rows_for(on_gpu(12, world_size=8), 8 * GB)  # the optimiser is shared
    assert rows_for(on_gpu(12), 0, micro_batch_rows=5) == 5
    assert rows_for(on_gpu(12), 0, micro_batch_rows=5, rows=2) == 2


def test_a_frozen_copy_and_float32_on_a_gpu_take_more():
    model = resolve_model(PretrainConfig(depth=4), 1000, 512)
    settings = {"world_size": 1, "compiled": False, "recompute": False}
    plain = training_memory(model, device="cuda", dtype=HALF, **settings)
    held = training_memory(model, device="cuda", dtype=HALF, frozen_copies=1, **settings)
    assert held.peak(3) - plain.peak(3) == plain.weights
    full = training_memory(model, device="cuda", dtype=FULL, **settings)  # no FlashAttention
    assert full.kept == training_memory(model, device="cpu", dtype=FULL, **settings).kept > 2 * plain.kept


@pytest.fixture
def free(monkeypatch):
    """Sets what the device has free."""
    return lambda size: monkeypatch.setattr(Hardware, "free_bytes", lambda self: size)


def test_a_model_that_cannot_fit_is_refused_before_anything_is_allocated(new_run, free, monkeypatch):
    monkeypatch.setattr(GPT, "__init__", lambda *arguments: pytest.fail("it is allocated"))
    free(100_000)
    run = new_run()
    with pytest.raises(ConfigError) as raised:
        run(tiny_config())
    assert str(raised.value).startswith("depth=3: needs 0.00 GiB on each worker (weights 0.00, gradients 0.00, optim")
    assert str(raised.value).endswith("shorter rows, or a larger device.")


def test_the_bound_is_what_one_recomputed_row_takes(new_run, free, tmp_path):
    model = resolve_model(tiny_config(), 300, 32)
    asked, least = (
        training_memory(model, world_size=1, device="cpu", dtype=FULL, compiled=False, recompute=recompute).peak(1)
        for recompute in (False, True)
    )
    assert least < asked
    for name, size, recompute in (("roomy", asked, False), ("tight", least, True)):
        free(size)
        steps = []
        backward = GPT.forward

        def seen(model, *arguments, backward=backward, steps=steps, **options):
            steps.append(model.recompute)
            return backward(model, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GPT, "forward", seen)
            assert new_run(name)(tiny_config(num_steps=1, sample_every=0)) is not None
        assert steps[0] is recompute
        notes = [record["note"] for record in storage.read_jsonl(StageFolder(str(tmp_path / name)).notes)]
        assert ("worker 0 has no memory for one row: activations are recomputed" in notes) is recompute
    free(least - 1)
    with pytest.raises(ConfigError, match="depth=3"):
        new_run("none")(tiny_config())


@pytest.mark.parametrize(("device", "share"), [("cpu", 25), ("cuda", 50)])
def test_a_worker_counts_on_its_share_of_the_memory(new_run, free, monkeypatch, device, share):
    """Four workers on this machine; where they have GPUs, two on each."""
    monkeypatch.setattr(learner, "choose_hardware", lambda config, run: Hardware(torch.device(device), HALF, ""))
    monkeypatch.setattr(learner, "choose_flash", lambda device, dtype: "")
    free(100 * GIB)
    config, run = tiny_config(depth=100, n_embd=8192, head_dim=128), RunContext(local_world_size=4, gpu_share=0.5)
    with pytest.raises(ConfigError, match=rf"the device has {share}\.00 GiB free for it"):
        Pretraining(config, run, new_run().inputs(config, rows_per_step=8))
