"""The run's mixture to the walk's section on conversations: one held-out conversation, its tokens and its loss mask."""

import numpy as np

from nanochat import storage
from nanochat.config.sft import SftConfig
from nanochat.data.conversations import render, supervised
from nanochat.errors import DataError
from nanochat.pages.walk_artifacts import Section, Values, Walk, shown_tokens
from nanochat.tasks.mixture import MixtureSource, load_mixture
from nanochat.training.sft import FineTuning


def conversation_values(walk: Walk) -> Values:
    """Return the first held-out conversation that calls the calculator (else the first), each token with its mask.

    Raises: DataError if there was no fine-tuning, or another version wrote its config.
    """
    path = walk.folder.sft.config
    if not storage.exists(path):
        raise DataError(f"sft={path}: there is no such file. Run ray_jobs/sft.py.")
    fields = storage.read_json(path)["config"]["sft"]
    try:
        config = SftConfig(**fields | {"mixture": tuple(fields["mixture"])})
    except (TypeError, KeyError) as err:
        raise DataError(f"sft={path}: has other fields ({err}). Use the version that wrote it.") from err
    held_out = load_mixture(MixtureSource(config, walk.folder.tasks)).validation()
    called = (one for one in held_out if any(part.kind == "python" for part in one.messages[-1].parts))
    conversation = next(called, held_out[0])
    ids = render(walk.tokenizer, conversation)
    mask = supervised(walk.tokenizer, np.asarray(ids))
    return {
        "tokens": [
            shown | {"says": says} for shown, says in zip(shown_tokens(walk.tokenizer, ids), mask.tolist(), strict=True)
        ],
        "count": len(ids),
        "supervised": int(mask.sum()),
    }


CHAT_SECTIONS = (
    Section("conversation", "A conversation and its mask", (render, supervised, FineTuning), conversation_values),
)
