"""A run directory to what the walk asks for: its tokenizer, its rows, its model before and after training.

The first row of the validation split is followed: the model never trained on it, so its losses are honest. Models run
uncompiled, in float32, on CPU; a document of the row sees the others as in the run's training and evaluation.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat import storage
from nanochat.config.model import ModelConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import CheckpointError, DataError
from nanochat.model.gpt import GPT
from nanochat.storage import RunFolder
from nanochat.training.checkpoint import Checkpoint, load_parameters, newest_checkpoint, step_folder
from nanochat.training.step import document_numbers

Values = dict[str, Any]


class Walk:
    """The run's artifacts and the row that is followed, each read when a section first asks for it."""

    def __init__(self, run_dir: str) -> None:
        self.folder = RunFolder(run_dir)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer. Raises: DataError if there is none."""
        return Tokenizer.load(self.folder.tokenizer)

    @functools.cached_property
    def shards(self) -> TokenShards:
        """The packed rows. Raises: DataError if there are none, TokenizerMismatchError if not of this tokenizer."""
        shards = TokenShards.load(self.folder.shards)
        shards.check_tokenizer(self.tokenizer)
        return shards

    @functools.cached_property
    def row(self) -> list[int]:
        """The sequence_len + 1 ids of the followed row: the first of the validation split."""
        return next(self.validation_rows())

    @property
    def document(self) -> list[int]:
        """The ids of the row's first document, BOS included."""
        return self.row[: piece_lengths(self.row, self.tokenizer.bos)[0]]

    def validation_rows(self) -> Iterator[list[int]]:
        """Yield the validation rows in manifest order."""
        shards = self.shards.split("validation")
        for shard, group, _ in self.shards.groups("validation"):
            yield from self.shards.read_rows(shards[shard], group).tolist()

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The newest complete checkpoint. Raises: CheckpointError if there is none."""
        step = newest_checkpoint(self.folder.pretrain.checkpoints, passed_over=lambda line: None)
        if step is None:
            raise CheckpointError(f"run_dir={self.folder.root}: has no complete checkpoint. Run the pretraining.")
        return Checkpoint(step_folder(self.folder.pretrain.checkpoints, step))

    @functools.cached_property
    def config(self) -> PretrainConfig:
        """How the model was trained. Raises: DataError if another version of this code wrote it."""
        path = self.folder.pretrain.config
        if not storage.exists(path):
            raise DataError(f"pretrain={path}: there is no such file. Run the pretraining.")
        try:
            return PretrainConfig(**storage.read_json(path)["config"]["pretrain"])
        except TypeError as err:
            raise DataError(f"pretrain={path}: has other fields ({err}). Use the version that wrote it.") from err

    @functools.cached_property
    def models(self) -> tuple[GPT, GPT]:
        """The model before training, drawn anew from the run's seed, and after."""
        model_config = ModelConfig(**self.checkpoint.state["model"])
        untrained, trained = GPT(model_config), GPT(model_config)
        untrained.initialize(torch.Generator().manual_seed(self.config.seed))
        load_parameters(trained, self.checkpoint.model_tensors(), self.checkpoint.folder)
        return untrained.eval(), trained.eval()

    @functools.cached_property
    def losses(self) -> tuple[Tensor, Tensor]:
        """Nats of each of the row's targets before and after training, float32 of shape (sequence_len,)."""
        row_1T = torch.tensor([self.row])
        inputs_1T, targets_1T = row_1T[:, :-1], row_1T[:, 1:]
        document_1T = document_numbers(inputs_1T, self.tokenizer.bos) if self.config.document_masking else None
        before, after = (model.token_losses(inputs_1T, targets_1T, document_1T)[0] for model in self.models)
        return before, after


@dataclass(frozen=True)
class Section:
    """One stop of the walk."""

    name: str
    """Of its macro in walk_sections.html, and of its anchor."""
    title: str
    code: tuple[Callable[..., Any], ...]
    """Functions and classes that did the work."""
    values: Callable[[Walk], Values]
    """Computes what the macro shows. Raises: NanochatError where something is missing; the page shows its message."""
    needs: str | None = None
    """A file of the run without which the section is left out: its stage is not part of every run."""


def shown_tokens(tokenizer: Tokenizer, ids: Sequence[int], weights: Sequence[float] | None = None) -> list[Values]:
    """Return each token as the page shows it; `weights` in [0, 1] colour them. Half a character shows as its bytes."""
    return [
        {
            "id": token,
            "text": tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace").replace("\n", "\u21b5\n"),
            "special": token >= tokenizer.bos,
            "weight": weight,
        }
        for token, weight in zip(ids, [None] * len(ids) if weights is None else weights, strict=True)
    ]


def piece_lengths(row: Sequence[int], bos: int) -> list[int]:
    """Return the tokens of each document of a row, BOS included; lengths of 1 at the end are padding."""
    starts = [place for place, token in enumerate(row) if token == bos]
    return [end - start for start, end in zip(starts, [*starts[1:], len(row)])]
