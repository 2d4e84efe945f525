"""A model that was trained elsewhere to a run directory, from which fine-tuning, scores and serving go on."""

import sys

import tyro

from nanochat.config.exchange import ImportConfig


def import_checkpoint(config: tyro.conf.OmitArgPrefixes[ImportConfig]) -> int:
    """Import a checkpoint of karpathy/nanochat or a Hugging Face folder into a run directory; no Ray is started."""
    from nanochat import storage
    from nanochat.cluster.terminal import Terminal, run_job

    def main() -> None:
        from nanochat.exchange.import_run import read_source, write_run

        terminal = Terminal()
        model = read_source(config)
        with storage.claimed(config.run_dir):
            checkpoint = write_run(model, config, terminal.line)
        job = "chat.py" if checkpoint.is_chat else "sft.py"
        terminal.line(f"next       python ray_jobs/{job} --run-dir {config.run_dir}")

    return run_job(main, config.run_dir)


if __name__ == "__main__":
    sys.exit(tyro.cli(import_checkpoint))
