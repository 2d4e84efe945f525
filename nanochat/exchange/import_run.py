"""A model that was trained elsewhere to a run directory from which fine-tuning, scores and serving go on.

It becomes the checkpoint of a stage, written by the writer of all checkpoints, beside its tokenizer. What it lacks is
made so that nothing has to ask where a model is from: the optimiser's state is that of one that has not begun (zeros,
at update 0: a warm start from it is a cold one), batch and learning rates are those that the depth dial gives a model
of this size. `stage.imported` in state.json says what it is, so no training resumes from it; config.json refuses the
attempt before.

Source: where nanochat keeps its files: checkpoint_manager.py and common.py of karpathy/nanochat@92d63d4.
Not covered: others' optimiser state; pretraining that goes on.
"""

import re
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nanochat import storage
from nanochat.config import generation
from nanochat.config.exchange import ImportConfig, ImportedConfig
from nanochat.config.model import ModelConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import CheckpointError, ConfigError, TokenizerMismatchError
from nanochat.evaluation.hf_model import weights_of
from nanochat.exchange.hf_folder import read_folder
from nanochat.exchange.nanochat_checkpoint import load_nanochat_checkpoint, version_of
from nanochat.exchange.pickled_tokenizer import read_pickled_tokenizer
from nanochat.model import scaling
from nanochat.model.optimizer import MuonAdamW
from nanochat.provenance import begin_stage, check_stage
from nanochat.storage import RunFolder, StageFolder
from nanochat.training import plan as planning
from nanochat.training.checkpoint import Checkpoint, CheckpointWriter, problem_with, step_folder, steps_found
from nanochat.training.plan import Plan

CHAT_FOLDERS = ("chatsft_checkpoints", "chatrl_checkpoints")
"""Where nanochat keeps models that were fine-tuned on conversations."""
PICKLED = "tokenizer.pkl"
_MODEL_FILE = re.compile(r"model_(\d+)\.pt")


@dataclass(frozen=True)
class ForeignModel:
    """A model that was trained elsewhere, read and checked."""

    origin: str
    """What it is, in words."""
    step: int
    """From 1 on: a step 0 would be a training that has not begun."""
    weights_sha256: str
    """Hash of the files that its weights are in."""
    config: ModelConfig
    tensors: dict[str, Tensor]
    """float32, under our names, the vocabulary padded with zeros."""
    tokenizer: Tokenizer
    is_chat: bool
    """Whether it was fine-tuned on conversations, as far as its folder tells."""
    generation: dict[str, float]
    """Sampling parameters where a request names none; {} = as for any model of its stage."""


def read_source(config: ImportConfig) -> ForeignModel:
    """Return the model of a folder of karpathy/nanochat or Hugging Face; nothing in it is run.

    Raises: ConfigError, CheckpointError or DataError saying what in it cannot be used.
    """
    if config.source.endswith(".pt"):
        raise ConfigError(f"source={config.source}: is a file. Name its folder, and which of its models with --step.")
    names = storage.list_names(config.source)
    if not names:
        raise ConfigError(f"source={config.source}: is empty or not there. Name the folder of a model.")
    if {"state.json", "model.safetensors"} <= set(names):
        raise ConfigError(
            f"source={config.source}: is a checkpoint of nanochat on Ray. Go on from it: sft.py and rl.py take --base."
        )
    if "config.json" in names:
        return _read_hf(config)
    steps = {int(match[1]): match[0] for name in names if (match := _MODEL_FILE.fullmatch(name))}
    if not steps:
        raise ConfigError(
            f"source={config.source}: has neither model_*.pt nor config.json. Name a folder such as "
            "~/.cache/nanochat/base_checkpoints/d20, or one of Hugging Face."
        )
    step = max(steps) if config.step is None else config.step
    if step not in steps:
        raise ConfigError(f"step={step}: {config.source} has {', '.join(map(str, sorted(steps)))}. Name one of them.")
    return _read_nanochat(config, step, steps[step])


def write_run(model: ForeignModel, config: ImportConfig, say: Callable[[str], None]) -> Checkpoint:
    """Write a model as a stage's checkpoint; what is there already of the same import stays.

    Raises: TokenizerMismatchError, CheckpointError or ConfigError, before anything is written, if the run directory has
    another tokenizer or the stage something else.
    """
    folder = RunFolder(config.run_dir)
    stage_name = config.stage or ("sft" if model.is_chat else "pretrain")
    stage: StageFolder = getattr(folder, stage_name)
    checkpoint = Checkpoint(step_folder(stage.checkpoints, model.step))
    plan, rates = dial(model)
    state = _state(model, plan, rates, is_chat=stage_name == "sft")
    configs = {
        "import": replace(config, source=storage.absolute(config.source)),
        stage_name: ImportedConfig(origin=model.origin),
    }
    say(f"read       {model.origin}: {plan.as_json()['parameters']['total']:,} parameters, {_sizes(model.config)}")
    if config.stage is None and not model.is_chat:
        say("           as a base model; --stage sft says of a model that it was fine-tuned on conversations")
    if stage_name == "sft":
        say("           as a fine-tuned model, whatever came after its fine-tuning: sft.py, rl.py and serve.py take it")
    has_tokenizer = _has_tokenizer(folder, model)
    is_there = _is_there(stage, checkpoint, state)
    if not is_there:
        check_stage(stage.root, configs)
    if not has_tokenizer:
        model.tokenizer.save(folder.tokenizer)
    if is_there:
        say(f"there      {checkpoint.folder} is this model already: nothing was written")
        return checkpoint
    unknown = {"rows_per_step": None, "flops_per_token": None}  # the plan's are for what comes, not what has been
    inherited = {f"{name}_lr": rate for name, rate in asdict(rates).items()}
    begin_stage(stage.root, configs, plan.as_json() | unknown | {"base": model.origin, "inherited": inherited})
    _write(stage, model, plan, rates, state)
    say(f"wrote      {checkpoint.folder}")
    return checkpoint


def dial(model: ForeignModel) -> tuple[Plan, scaling.LearningRates]:
    """Return what the depth dial gives a model of this size: batch, its factor on learning rates, decay."""
    config, defaults = model.config, PretrainConfig()
    tokens = scaling.horizon_tokens(config, defaults.tokens_per_parameter)
    at_reference = scaling.reference_tokens(config, defaults.tokens_per_parameter)
    rows = max(1, scaling.batch_tokens(tokens, at_reference) // config.sequence_len)
    batch = rows * config.sequence_len
    plan = Plan(
        model=config, num_steps=model.step, rows_per_step=rows, lr_factor=scaling.batch_lr_factor(batch),
        weight_decay=scaling.scaled_weight_decay(defaults.weight_decay, batch, tokens, at_reference),
        flops_per_token=scaling.flops_per_token(config, config.sequence_len),
    )  # fmt: skip
    return plan, planning.learning_rates(defaults)


def _read_hf(config: ImportConfig) -> ForeignModel:
    for field in ("step", "tokenizer"):
        if (value := getattr(config, field)) is not None:
            raise ConfigError(f"{field}={value}: a Hugging Face folder has one model and its tokenizer. Leave it out.")
    found = read_folder(config.source)
    return ForeignModel(
        origin=f"the Hugging Face folder {storage.name_of(storage.absolute(config.source))}", step=1,
        weights_sha256=weights_of(config.source), config=found.config, tensors=found.tensors,
        tokenizer=found.tokenizer, is_chat=found.is_chat, generation=found.generation,
    )  # fmt: skip


def _read_nanochat(config: ImportConfig, step: int, name: str) -> ForeignModel:
    source = storage.absolute(config.source)
    path = storage.join(source, name)
    meta = storage.join(source, name.replace("model_", "meta_").replace(".pt", ".json"))
    tokenizer_path = _tokenizer_path(config, source)
    tokenizer = read_pickled_tokenizer(tokenizer_path)
    found, tensors = load_nanochat_checkpoint(path, meta)
    if tokenizer.vocab_size != found.vocab_size:
        raise TokenizerMismatchError(
            f"tokenizer={tokenizer_path}: has {tokenizer.vocab_size} tokens, the model {found.vocab_size}. "
            "Name the model's own with --tokenizer."
        )
    return ForeignModel(
        origin=f"karpathy/nanochat of {version_of(found)}, step {step}", step=max(1, step),
        weights_sha256=storage.sha256_file(path), config=found, tensors=tensors, tokenizer=tokenizer,
        is_chat=storage.name_of(source.rsplit("/", 1)[0]) in CHAT_FOLDERS, generation={},
    )  # fmt: skip


def _tokenizer_path(config: ImportConfig, source: str) -> str:
    """Return where the tokenizer lies: as named, else beside the model, else in nanochat's tree above it."""
    if config.tokenizer is not None:
        named = storage.absolute(config.tokenizer)
        inside = storage.join(named, PICKLED)
        return inside if storage.exists(inside) else named
    places = [storage.join(source, PICKLED), storage.join(source.rsplit("/", 2)[0], "tokenizer", PICKLED)]
    for place in places:
        if storage.exists(place):
            return place
    raise ConfigError(f"tokenizer=None: neither {places[0]} nor {places[1]} is there. Name {PICKLED} with --tokenizer.")


def _sizes(config: ModelConfig) -> str:
    return f"{config.n_layer} layers of width {config.n_embd}, {config.vocab_size:,} tokens"


def _state(model: ForeignModel, plan: Plan, rates: scaling.LearningRates, is_chat: bool) -> dict[str, Any]:
    """Return what state.json has of the model."""
    imported = {"imported": {"origin": model.origin, "weights_sha256": model.weights_sha256}}
    return {
        "plan": plan.as_json(),
        "model": asdict(model.config),
        "tokenizer_hash": model.tokenizer.hash,
        "rates": asdict(rates),
        "updates": 0,
        "stage": imported | ({"base_sha256": None} if is_chat else {}),
        "generation": model.generation or dict(generation.CHAT if is_chat else generation.BASE),
        "document_masking": False,
    }


def _has_tokenizer(folder: RunFolder, model: ForeignModel) -> bool:
    """Tell whether the run has the model's tokenizer. Raises: TokenizerMismatchError if it has another."""
    if not storage.exists(storage.join(folder.tokenizer, "tokenizer.json")):
        return False
    if Tokenizer.load(folder.tokenizer).hash != model.tokenizer.hash:
        raise TokenizerMismatchError(f"run_dir={folder.root}: has another tokenizer. Import into another --run-dir.")
    return True


def _is_there(stage: StageFolder, checkpoint: Checkpoint, state: dict[str, Any]) -> bool:
    """Tell whether just this was imported before. Raises: CheckpointError if the stage has anything else."""
    is_whole = problem_with(checkpoint.folder) is None
    if is_whole and state.items() <= checkpoint.state.items():
        return True
    others = [step_folder(stage.checkpoints, step) for step in steps_found(stage.checkpoints)]
    if not is_whole and checkpoint.folder in others:  # left by an import that was ended: written again
        others.remove(checkpoint.folder)
    if others:
        raise CheckpointError(f"run_dir={stage.root}: has {others[-1]} already. Import into another --run-dir.")
    return False


def _write(
    stage: StageFolder, model: ForeignModel, plan: Plan, rates: scaling.LearningRates, state: dict[str, Any]
) -> None:
    """Write the checkpoint, with the state of an optimiser that has not begun."""
    parameters = {name: nn.Parameter(tensor) for name, tensor in model.tensors.items()}
    groups = scaling.parameter_groups(model.config, list(parameters), rates, plan.lr_factor)
    optimizer = MuonAdamW(parameters, groups, muon_dtype=torch.float32)
    writer = CheckpointWriter(stage.checkpoints, rank=0, world_size=1, keep=1, attempt=uuid.uuid4().hex)
    writer.save(model.step, model.tensors, optimizer.state_tensors(), state)
    writer.wait()
