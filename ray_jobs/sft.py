"""A base model to one that answers. Run again, it resumes; Ctrl-C leaves with a checkpoint."""

import sys

import tyro

from nanochat import storage
from nanochat.cluster.environment import set_ray_environment
from nanochat.config.cluster import ClusterConfig
from nanochat.config.sft import SftConfig


def sft(
    config: tyro.conf.OmitArgPrefixes[SftConfig],
    cluster: tyro.conf.OmitArgPrefixes[ClusterConfig],
    run_dir: str = "runs/base",
    show: int = 0,
) -> int:
    """Fine-tune a run directory's base model on a mixture of tasks.

    Args:
        run_dir: Run directory with a pretrained model, a local path or URI.
        show: Print this many conversations of the mixture, what is trained on in green, and leave.
    """
    set_ray_environment()
    from nanochat.cluster.jobs import finetune_chat
    from nanochat.cluster.session import session
    from nanochat.cluster.terminal import Terminal, run_job

    def main() -> None:
        if show:
            show_conversations(config, run_dir, show)
            return
        with storage.claimed(run_dir), session(cluster, run_dir):
            finetune_chat(run_dir, config, cluster, Terminal())

    return run_job(main, run_dir)


def show_conversations(config: SftConfig, run_dir: str, count: int) -> None:
    """Print the first conversations of a mixture with their loss mask."""
    from nanochat.data.conversations import coloured, render
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.tasks.mixture import MixtureSource, load_mixture

    folder = storage.RunFolder(run_dir)
    tokenizer = Tokenizer.load(folder.tokenizer)
    mixture = load_mixture(MixtureSource(config, folder.tasks))
    for index in range(min(count, len(mixture))):
        ids = render(tokenizer, mixture.joined(index))
        print(f"{coloured(tokenizer, ids)}\n-- {len(ids)} tokens\n")


if __name__ == "__main__":
    sys.exit(tyro.cli(sft))
