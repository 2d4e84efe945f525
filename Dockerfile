# The image of every node, head included: this project and all that it needs, so that nothing is installed when a node starts.
#
#   docker build -t YOUR-REGISTRY/nanochat-on-ray:0.1.0 .                                  # CUDA build of torch, about 8 GB
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t ... .     # without CUDA, about 2.5 GB
FROM python:3.12-slim-bookworm

# g++: torch.compile. rsync, openssh-client: `ray up`. wget: KubeRay's probes. procps: `ray stop`.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ git rsync openssh-client wget procps ca-certificates \
 && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 --shell /bin/bash ray
USER ray
WORKDIR /home/ray/nanochat
ENV PATH=/home/ray/.venv/bin:$PATH \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_worker_niceness=0

ARG TORCH_INDEX=
COPY --chown=ray pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ray nanochat nanochat
RUN python -m venv /home/ray/.venv \
 && pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} -c constraints.txt .[cloud,fp8,wandb]
COPY --chown=ray ray_jobs ray_jobs
COPY --chown=ray serve_config.yaml ./
