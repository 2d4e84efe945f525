"""The whole line: text to a base model, a chat model, a better one, scores, a report, an endpoint. It resumes."""

import os
import sys

import tyro

from nanochat import storage
from nanochat.cluster.environment import set_ray_environment
from nanochat.config.line import LineConfig, smoke_of
from nanochat.config.presets import PRESETS


def speedrun(line: LineConfig) -> int:
    """Do every stage whose artifact is not complete, in order; where the variable CI is set, serve one answer."""
    set_ray_environment()
    from nanochat.cluster.line import run_line
    from nanochat.cluster.terminal import Terminal, run_job

    def main() -> None:
        terminal = Terminal()
        with storage.claimed(line.run_dir):
            if line.smoke:
                terminal.line(f"smoke      ten steps of each stage in {smoke_of(line).run_dir}")
                run_line(smoke_of(line), terminal)
            run_line(line, terminal, is_check=bool(os.environ.get("CI")))

    return run_job(main, line.run_dir)


if __name__ == "__main__":
    sys.exit(speedrun(tyro.extras.overridable_config_cli(PRESETS)))
