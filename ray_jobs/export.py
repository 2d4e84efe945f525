"""A checkpoint to a Hugging Face folder with a model card; no Ray is started."""

import sys

import tyro

from nanochat.config.exchange import ExportConfig


def export(config: tyro.conf.OmitArgPrefixes[ExportConfig]) -> int:
    """Write a model in the format that transformers, vLLM and others read."""
    from nanochat.cluster.terminal import Terminal, run_job

    def main() -> None:
        from nanochat.exchange.hf_folder import export_checkpoint

        terminal = Terminal()
        folder = export_checkpoint(config, terminal.line)
        terminal.line(f"exported   {folder}; its README.md is the model card, and says how others load it")

    return run_job(main, config.run_dir)


if __name__ == "__main__":
    sys.exit(tyro.cli(export))
