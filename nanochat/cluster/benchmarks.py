"""The numbers that the README quotes, measured anew on any machine: training, packing, streaming.

Training through Ray is compared with the same loop in a plain process, both alive, taking turns: the turn lies in a
file, and each side's stream hands its rows out only while it has it. So both see the same machine in the same minutes.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nanochat import storage
from nanochat.cluster.environment import compile_cache
from nanochat.cluster.session import ray_context
from nanochat.cluster.stream import StreamSpec, steps_of
from nanochat.cluster.trainer import TrainJob, inputs_of, train_on_ray, worker_context
from nanochat.config.cluster import ClusterConfig
from nanochat.config.corpus import CorpusConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.data.corpora import Corpus, SourceShard, prepare_corpus
from nanochat.data.document_shards import write_token_shards
from nanochat.data.row_order import RowReader, StepRows
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import Tokenizer, train_tokenizer
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import MuonAdamW
from nanochat.model.scaling import parameter_groups
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder, StageFolder
from nanochat.training.checkpoint import CheckpointWriter
from nanochat.training.hardware import CPU_ALLOCATOR_ENVIRONMENT, matmul_gflops
from nanochat.training.loop import TrainingInputs, local_stream
from nanochat.training.memory import training_memory
from nanochat.training.plan import learning_rates, resolve
from nanochat.training.pretrain import pretrain

WINDOW_STEPS = 10
WARM_UP_S = 15.0
PACK_BYTES = 64_000_000


def training_config(num_steps: int) -> PretrainConfig:
    """Return the fixed benchmark: depth 4, width 256, heads of 64, steps of 8,192 tokens, window pattern L."""
    return PretrainConfig(
        depth=4, head_dim=64, window_pattern="L", global_batch_tokens=8192, micro_batch_rows=16, num_steps=num_steps,
        evaluate_every=0, sample_every=0, checkpoint_every=0, log_every=1, validation_tokens=16 * 512,
    )  # fmt: skip


def prepared(folder: RunFolder, corpus: str) -> tuple[TokenShards, Tokenizer, Corpus]:
    """Return shards of rows of 512, a tokenizer of 8,192 and the corpus they are from, made once in `folder`."""
    run = ray_context(lambda line: None)
    text = prepare_corpus(CorpusConfig(corpus=corpus), run, folder.text, None)
    if not storage.exists(storage.join(folder.tokenizer, "tokenizer.json")):
        train_tokenizer(TokenizerConfig(vocab_size=8192), run, text).save(folder.tokenizer)
    tokenizer = Tokenizer.load(folder.tokenizer)
    return write_token_shards(ShardsConfig(sequence_len=512), run, text, tokenizer, folder.shards), tokenizer, text


@dataclass
class TakingTurns:
    """A stream that hands out rows only while it is this side's turn, a window of steps at a time."""

    inner: Iterator[StepRows]
    side: str
    folder: str
    num_steps: int
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def __iter__(self) -> Iterator[StepRows]:
        """Yield the inner rows; at each border between windows note the time and pass the turn."""
        start_s = waited_s = gemm = 0.0
        for number in range(self.num_steps + 1):
            if number % WINDOW_STEPS == 0:
                now_s = time.perf_counter()
                if number:
                    self._note(number, now_s - start_s, waited_s, gemm)
                    self._pass_turn()
                self._await_turn()
                gemm = matmul_gflops(torch.bfloat16, self.device, repeats=10)
                start_s, waited_s = time.perf_counter(), 0.0
            before_s = time.perf_counter()
            rows = next(self.inner)
            waited_s += time.perf_counter() - before_s
            yield rows

    def _note(self, number: int, seconds: float, waited_s: float, gemm_gflops: float) -> None:
        record = {
            "step": number, "seconds": seconds, "waited_s": waited_s, "gemm_gflops": gemm_gflops, "end": time.time(),
        }  # fmt: skip
        storage.append_jsonl(f"{self.folder}/{self.side}.jsonl", record)

    def _pass_turn(self) -> None:
        other = {"ray": "plain", "plain": "ray"}[self.side]
        with storage.atomic_write(f"{self.folder}/turn") as file:
            file.write(other.encode())

    def _await_turn(self) -> None:
        turn = Path(self.folder, "turn")
        while turn.read_text() != self.side and not Path(self.folder, "done").exists():
            time.sleep(0.01)


def _turn_taking_worker(job: TrainJob) -> None:
    """Train as a Ray Train worker would, on a stream that takes turns."""
    run = worker_context(job)
    assert isinstance(job.config, PretrainConfig), "the benchmark pretrains"
    inputs = inputs_of(job, run)
    turns = TakingTurns(iter(inputs.stream), "ray", job.folder.root + "/turns", job.config.num_steps or 0)
    pretrain(job.config, run, replace(inputs, stream=turns))


def plain_process(root: str) -> None:
    """Train in this process alone, taking turns; run as `python -m nanochat.cluster.benchmarks ROOT`."""
    folder = RunFolder(root)
    shards, tokenizer = TokenShards.load(folder.shards), Tokenizer.load(folder.tokenizer)
    num_steps = int(os.environ["NANOCHAT_BENCHMARK_STEPS"])
    config = training_config(num_steps)
    plan = resolve(config, tokenizer.vocab_size, shards.sequence_len)
    stream = local_stream(RowReader(shards, "train", config.seed), plan.rows_per_step)
    turns = TakingTurns(stream, "plain", f"{root}/pretrain/turns", num_steps)
    pretrain(config, RunContext(), TrainingInputs(tokenizer, shards, turns, StageFolder(f"{root}/plain")))


def measure_training(
    root: str, corpus: str, num_steps: int, cluster: ClusterConfig, job_start_s: float
) -> dict[str, Any]:
    """Train through Ray and in a plain process, window by window; returns the README's training numbers."""
    folder = RunFolder(root)
    shards, *_ = prepared(folder, corpus)
    for stage in ("pretrain", "plain"):
        shutil.rmtree(f"{root}/{stage}", ignore_errors=True)
    turns = f"{root}/pretrain/turns"
    os.makedirs(turns)
    Path(turns, "turn").write_text("ray")
    environment = os.environ | CPU_ALLOCATOR_ENVIRONMENT
    environment |= {"TORCHINDUCTOR_CACHE_DIR": compile_cache(), "NANOCHAT_BENCHMARK_STEPS": str(num_steps)}
    config = training_config(num_steps)
    plain = subprocess.Popen([sys.executable, "-m", "nanochat.cluster.benchmarks", root], env=environment)
    try:
        start_s = time.time()
        plan = resolve(config, 8192, shards.sequence_len)
        train_on_ray(
            config, plan, cluster, shards, folder.tokenizer, folder.pretrain, lambda: None, _turn_taking_worker
        )  # fmt: skip
    finally:
        Path(turns, "done").touch()
        if plain.wait(timeout=120) != 0:
            raise RuntimeError("the plain process failed")
    return _training_numbers(root, turns, start_s, job_start_s)


def _training_numbers(root: str, turns: str, start_s: float, job_start_s: float) -> dict[str, Any]:
    """Turn the windows of both sides into medians; windows that ended in the first 15 s of training do not count."""
    sides = {side: storage.read_jsonl(f"{turns}/{side}.jsonl") for side in ("ray", "plain")}
    records = [record for record in storage.read_jsonl(f"{root}/pretrain/metrics.jsonl") if "loss" in record]
    first_done_s = records[0]["time"]
    pairs = [
        (ray_window, plain_window)
        for ray_window, plain_window in zip(sides["ray"], sides["plain"], strict=False)
        if ray_window["end"] - first_done_s > WARM_UP_S
    ]
    if not pairs:
        raise RuntimeError(
            f"steps={len(records)}: too few to measure after {WARM_UP_S:g} s of warm-up. Give more --steps."
        )
    rates = [WINDOW_STEPS * 8192 / ray_window["seconds"] for ray_window, _ in pairs]
    gemm = statistics.median(window["gemm_gflops"] for pair in pairs for window in pair)
    rate = statistics.median(rates)
    return {
        "train_tokens_per_s": rate,
        "train_tokens_per_s_windows": rates,
        "gemm_bf16_gflops": gemm,
        "train_tokens_per_s_per_gflops": rate / gemm,
        "ray_over_plain": statistics.median(plain["seconds"] / ray["seconds"] for ray, plain in pairs),
        "first_step_s": first_done_s - job_start_s,
        "first_step_after_fit_s": first_done_s - start_s,
        "data_wait_share": sum(ray["waited_s"] for ray, _ in pairs) / sum(ray["seconds"] for ray, _ in pairs),
        "peak_memory_bytes": records[-1]["peak_memory_bytes"],
        "peak_memory_growth_bytes": records[-1]["peak_memory_bytes"] - records[WINDOW_STEPS]["peak_memory_bytes"],
        "loss_at_end": records[-1]["loss"],
    }


def measure_checkpoint(root: str) -> dict[str, float]:
    """Save the benchmark's model and optimiser three times; medians of the time the loop waits and of the whole."""
    config = training_config(1)
    plan = resolve(config, 8192, 512)
    model = GPT(plan.model)
    parameters = dict(model.named_parameters())
    groups = parameter_groups(plan.model, list(parameters), learning_rates(config), plan.lr_factor)
    optimizer = MuonAdamW(parameters, groups, muon_dtype=torch.float32)
    folder = f"{root}/checkpoint"
    writer = CheckpointWriter(folder, rank=0, world_size=1, keep=1, attempt="benchmark")
    blocked, whole = [], []
    for step in range(3):
        start_s = time.perf_counter()
        writer.save(step, optimizer.parameters, optimizer.state_tensors(), {})
        blocked.append(time.perf_counter() - start_s)
        writer.wait()
        whole.append(time.perf_counter() - start_s)
    shutil.rmtree(folder)
    return {"checkpoint_blocked_s": statistics.median(blocked), "checkpoint_written_s": statistics.median(whole)}


def measure_packing(root: str, corpus: str) -> dict[str, Any]:
    """Tokenise and pack copies of the corpus, about 64 MB of text, with as many tasks as there are CPUs."""
    folder = RunFolder(root)
    _, tokenizer, text = prepared(folder, corpus)
    sources = text.sources("train")
    copies = max(2, -(-PACK_BYTES // sum(source.size_bytes for source in sources) // 3))
    shutil.rmtree(f"{root}/pack", ignore_errors=True)
    many: list[SourceShard] = []
    for copy in range(copies):
        for number, source in enumerate(sources):
            path = f"{root}/pack/text/{copy:03d}_{number:03d}_{storage.name_of(source.path)}"
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(os.path.abspath(source.path), path)
            many.append(replace(source, path=path))
    held_out = [source for source in text.shards if source.split == "validation"][:1] or []
    corpus_copies = replace(text, shards=(*many, *held_out))
    run = ray_context(lambda line: None)
    list(run.map(_warm_up, range(4)))
    start_s = time.perf_counter()
    packed = write_token_shards(ShardsConfig(sequence_len=512), run, corpus_copies, tokenizer, f"{root}/pack/shards")
    elapsed_s = time.perf_counter() - start_s
    tokens = sum(shard.tokens for shard in packed.shards)
    cropped = sum(shard.cropped_tokens for shard in packed.split("train"))
    return {
        "pack_tokens_per_s": tokens / elapsed_s,
        "pack_tokens": tokens,
        "pack_cropped_share": cropped / sum(shard.tokens for shard in packed.split("train")),
    }


def _warm_up(number: int) -> int:
    """Import what packing needs in a worker process."""
    import pyarrow.parquet
    import tiktoken

    return number + len([pyarrow.parquet, tiktoken])


def measure_streaming(root: str, corpus: str, tokens: int = 60_000_000) -> dict[str, Any]:
    """Read steps of 524,288 tokens through Ray Data into one consumer, as a training worker would."""
    import ray.data

    from nanochat.cluster.session import start_ray

    shards, *_ = prepared(RunFolder(root), corpus)
    start_ray()
    rows_per_step = 1024
    num_steps = max(4, tokens // (rows_per_step * shards.sequence_len))
    spec = StreamSpec(
        shards=shards, seed=0, rows_per_step=rows_per_step, num_steps=num_steps, workers=[1],
        folder=StageFolder(f"{root}/stream"),
    )  # fmt: skip
    dataset = spec.dataset(0)
    dataset.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    (split,) = dataset.streaming_split(1, equal=True)
    times = []
    for rows in steps_of(split, 1, 1):
        times.append(time.perf_counter())
        if rows.step == num_steps - 1:
            break
    steady = (len(times) - 1) * rows_per_step * shards.sequence_len
    return {"stream_tokens_per_s": steady / (times[-1] - times[0]), "stream_steps": len(times)}


def memory_by_calculation(depth: int) -> dict[str, int]:
    """Return what training needs at a depth on CPU: 8,192-token micro-batches, rows of 512, 8,192 words, one worker."""
    plan = resolve(replace(training_config(1), depth=depth), 8192, 512)
    memory = training_memory(
        plan.model, world_size=1, device="cpu", dtype=torch.bfloat16, compiled=True, recompute=False
    )
    return {"weights_and_optimizer_bytes": memory.fixed, "micro_batch_bytes": memory.peak(16) - memory.fixed}


if __name__ == "__main__":
    plain_process(sys.argv[1])
