"""A model of the `transformers` library, on disk, as a Scorer: the yardstick (GPT-2) goes through the same harness.

Whole sequences in batches of like length, padded on the right; the head runs from the first scored position on.
Not covered: shared prefixes (`nanochat.evaluation.scoring` has them for our models), models split over devices.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from nanochat import storage
from nanochat.errors import ConfigError, excerpt
from nanochat.evaluation.scoring import Group, Option, Score, cropped, cut_by_length, judged, score_of

BATCH_TOKENS = 4096
"""Of one forward, padding included: at most 0.8 GB of logits with GPT-2's vocabulary."""


def weights_of(path: str) -> str:
    """Return a hash of a model's files of weights."""
    names = [name for name in storage.list_names(path) if name.endswith(".safetensors")]
    return storage.sha256_json([(name, storage.sha256_file(storage.join(path, name))) for name in names])


class HFScorer:
    """A local causal language model and its tokenizer as Scorer."""

    def __init__(self, path: str, batch_tokens: int | None = None, device: torch.device | str = "cpu") -> None:
        """Load what `save_pretrained` wrote, in float32; nothing is downloaded, unpickled or run.

        `bos` is the tokenizer's, or its end-of-text token where it has none; `max_tokens` is what the model has
        positions for; `batch_tokens` none = BATCH_TOKENS. Raises: ConfigError if transformers is not installed or
        `path` is no such model, whole.
        """
        try:
            library: Any = importlib.import_module("transformers")
        except ImportError as err:
            raise ConfigError(f"model={path}: needs the package transformers. pip install transformers") from err
        try:
            self._tokenizer = library.AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
            model, loaded = library.AutoModelForCausalLM.from_pretrained(
                path, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
                output_loading_info=True,
            )  # fmt: skip
        except Exception as err:  # of damaged files each part of the library says so with another class, or none
            raise ConfigError(f"model={path}: is no model on this disk ({excerpt(err)}). Fetch it first.") from err
        # Of what is not there the library makes random weights and a tokenizer without tokens.
        if loaded["missing_keys"] or not self.encode("tokens"):
            raise ConfigError(f"model={path}: lacks weights or a tokenizer. Fetch all files that belong to it.")
        self._model = model.to(device).eval()
        self._batch_tokens = batch_tokens or BATCH_TOKENS
        specials = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        self.bos: int = next((token for token in specials if token is not None), -1)
        if self.bos < 0:
            raise ConfigError(f"model={path}: its tokenizer has neither a BOS nor an EOS token. Give it one.")
        self.max_tokens: int = getattr(model.config, "max_position_embeddings", self._tokenizer.model_max_length)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        """Score the options of every group. Raises: DataError if an option's scored tokens are too many."""
        scores: list[dict[Option, Score]] = [{} for _ in groups]
        todo: list[tuple[int, Option, Option]] = []
        for place, group in enumerate(groups):
            distinct = list(dict.fromkeys(group))
            todo += [(place, *pair) for pair in zip(distinct, cropped(distinct, self.max_tokens, self.bos))]
        for batch in cut_by_length(todo, lambda entry: len(entry[2].tokens), self._batch_tokens):
            for (place, option, _), score in zip(batch, self._score_batch([entry[2] for entry in batch]), strict=True):
                scores[place][option] = score
        return [[scores[place][option] for option in group] for place, group in enumerate(groups)]

    def _score_batch(self, options: list[Option]) -> list[Score]:
        width = max(len(option.tokens) for option in options)
        spare = [width - len(option.tokens) for option in options]
        device = self._model.device
        tokens_BT = torch.tensor([[*option.tokens, *[0] * n] for option, n in zip(options, spare)], device=device)
        mask_BT = torch.tensor([[1] * (width - n) + [0] * n for n in spare], device=device)
        first = min(option.start for option in options) - 1
        kept = torch.arange(first, width - 1, device=device)
        logits_BTV = self._model(input_ids=tokens_BT, attention_mask=mask_BT, logits_to_keep=kept).logits.float()
        scores = []
        for logits_TV, option in zip(logits_BTV, options, strict=True):
            targets_N = torch.tensor(option.tokens[option.start :], device=device)
            begin = option.start - 1 - first
            nats_N, greedy_N = judged(logits_TV[begin : begin + len(targets_N)], targets_N)
            scores.append(score_of(nats_N.tolist(), greedy_N.tolist()))
        return scores
