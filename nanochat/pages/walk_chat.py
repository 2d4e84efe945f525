"""A run's chat stages to the walk's sections: a held-out conversation and its loss mask, rollouts and their rewards."""

import numpy as np

from nanochat import storage
from nanochat.config.sft import SftConfig
from nanochat.data.conversations import render, supervised
from nanochat.errors import DataError
from nanochat.inference.rollouts import GroupSampler
from nanochat.pages.walk_artifacts import Section, Values, Walk, shown_tokens
from nanochat.tasks.mixture import MixtureSource, load_mixture
from nanochat.training.policy_gradient import advantages
from nanochat.training.rl import PolicyTraining
from nanochat.training.sft import FineTuning

REPLY = ("which", "group", "question", "reply", "reward", "tokens", "truncated")


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


def rollout_values(walk: Walk) -> Values:
    """Return the newest noted best and worst reply of one group, with what their advantages do.

    Raises: DataError if there is none yet, or another version wrote the notes.
    """
    path = walk.folder.rl.samples
    written, notes = storage.read_json(walk.folder.rl.config), storage.read_jsonl(path)
    try:
        config = written["config"]["rl"]
        for note in reversed(notes):
            best, worst = ({name: one[name] for name in REPLY} for one in note["samples"])
            if best["group"] == worst["group"] and best["reward"] > worst["reward"]:
                return {
                    "step": note["step"], "question": best["question"], "samples": config["samples_per_group"],
                    "advantage": config["advantage"], "skips_cut": config["mask_truncated"],
                    "replies": [best, worst],
                }  # fmt: skip
    except (TypeError, KeyError, ValueError) as err:
        raise DataError(f"rl={path}: has other fields ({err}). Use the version that wrote it.") from err
    raise DataError(f"rl={path}: has no two replies to one question with different rewards yet.")


CHAT_SECTIONS = (
    Section("conversation", "A conversation and its mask", (render, supervised, FineTuning), conversation_values),
    Section(
        "rollouts", "Replies and their rewards", (GroupSampler, advantages, PolicyTraining), rollout_values,
        needs="rl/config.json",
    ),
)  # fmt: skip
