"""Raw text to token shards: fetch a corpus, train its tokenizer, pack rows. Run again, it does only what is missing."""

import sys

import tyro

from nanochat import storage
from nanochat.cluster.environment import set_ray_environment
from nanochat.config.cluster import ClusterConfig
from nanochat.config.corpus import CorpusConfig
from nanochat.config.shards import ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig


def prepare(
    corpus: tyro.conf.OmitArgPrefixes[CorpusConfig],
    tokenizer: tyro.conf.OmitArgPrefixes[TokenizerConfig],
    shards: tyro.conf.OmitArgPrefixes[ShardsConfig],
    cluster: tyro.conf.OmitArgPrefixes[ClusterConfig],
    run_dir: str = "runs/base",
    train_tokens: int | None = None,
) -> int:
    """Fetch a corpus, train its tokenizer and pack token shards.

    Args:
        run_dir: Run directory, a local path or URI.
        train_tokens: Tokens that will be trained on: how many shards of fineweb-edu or climbmix are fetched.
    """
    set_ray_environment()
    from nanochat.cluster.jobs import prepare_data
    from nanochat.cluster.session import session
    from nanochat.cluster.terminal import Terminal, run_job

    def main() -> None:
        with storage.claimed(run_dir), session(cluster, run_dir):
            prepare_data(run_dir, corpus, tokenizer, shards, train_tokens, cluster, Terminal())

    return run_job(main, run_dir)


if __name__ == "__main__":
    sys.exit(tyro.cli(prepare))
