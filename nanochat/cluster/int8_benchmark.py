"""One model in bfloat16 and in 8-bit integers, in turns in one process: tokens per second, and what it costs in bits.

Speed is that of the run directory's base model and of a model of depth 12 with random weights, whose products wait for
memory; bits per byte are those of the run's validation rows, and say something where its base model is trained.
"""

import copy
import statistics
from dataclasses import replace
from typing import Any

import torch

from nanochat.cluster.backend_benchmark import timed
from nanochat.cluster.benchmarks import training_config
from nanochat.cluster.serving_benchmark import CONCURRENCY
from nanochat.config.training import LearnerConfig
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import Tokenizer
from nanochat.evaluation.bits_per_byte import bits_per_byte, count_nats_and_bytes
from nanochat.inference.engine import Engine
from nanochat.inference.load import load_model
from nanochat.model.gpt import GPT
from nanochat.model.int8 import convert_to_int8, multiplies_int8
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder
from nanochat.training.checkpoint import newest_of
from nanochat.training.hardware import choose_hardware
from nanochat.training.plan import resolve

ROUNDS = 3
DEPTH, VOCABULARY = 12, 32_768
VALIDATION_ROWS = 200


def measure_int8(run_dir: str) -> dict[str, Any]:
    """Return medians over rounds by model, requests at a time and dtype, and bits per byte; nothing where int8 is not.

    Raises: CheckpointError if the run has no base model.
    """
    hardware = choose_hardware(LearnerConfig(), RunContext())
    if not (hardware.dtype == torch.bfloat16 and multiplies_int8(hardware.device)):
        return {}
    folder = RunFolder(run_dir)
    checkpoint, tokenizer = newest_of(folder.pretrain, print), Tokenizer.load(folder.tokenizer)
    base = {dtype: load_model(checkpoint, tokenizer, RunContext(), dtype) for dtype in ("bfloat16", "int8")}
    half, integers = (_bits(model, folder) for model in base.values())
    results: dict[str, Any] = {"bits_per_byte_bfloat16": half, "bits_per_byte_added": integers - half}
    for name, pair in (("base", base), (f"depth_{DEPTH}", _random_pair())):
        for model in pair.values():
            timed(Engine(model, max_running=1), 1, seed=0)
        results[name] = {f"c{count}": _compare(pair, count) for count in CONCURRENCY}
    return results


def _random_pair() -> dict[str, GPT]:
    config = resolve(replace(training_config(1), depth=DEPTH), VOCABULARY, 512).model
    model = GPT(config, torch.bfloat16)
    model.initialize(torch.Generator().manual_seed(0))
    model.to(torch.bfloat16)
    return {"bfloat16": copy.deepcopy(model).prepare_for_inference(), "int8": convert_to_int8(model)}


def _bits(model: GPT, folder: RunFolder) -> float:
    tokenizer, shards = Tokenizer.load(folder.tokenizer), TokenShards.load(folder.shards)
    batches = shards.validation_batches(rows=8, limit=VALIDATION_ROWS, padding=tokenizer.bos, rank=0, world_size=1)
    return bits_per_byte(*count_nats_and_bytes(model, batches, torch.from_numpy(tokenizer.token_bytes())).tolist())


def _compare(pair: dict[str, GPT], count: int) -> dict[str, float]:
    speeds: dict[str, list[float]] = {dtype: [] for dtype in pair}
    for number in range(ROUNDS):
        for dtype, model in pair.items():
            engine = Engine(model, max_running=count)
            speeds[dtype].append(timed(engine, count, seed=1000 * count + number)["tokens_per_s"])
    ratios = [integers / half for half, integers in zip(*speeds.values(), strict=True)]
    medians = {f"tokens_per_s_{dtype}": statistics.median(found) for dtype, found in speeds.items()}
    return medians | {"int8_over_bfloat16": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
