"""What the endpoint serves, to whom, and within which limits."""

import ipaddress
from dataclasses import dataclass
from typing import Literal

from nanochat.config.training import below_least
from nanochat.errors import ConfigError

EngineName = Literal["native", "vllm"]


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """An OpenAI-compatible endpoint with a chat page."""

    run_dir: str = "runs/demo"
    """Run directory, a local path or URI."""
    models: tuple[str, ...] = ("sft",)
    """Models side by side: stages of the run directory (pretrain, sft, rl), or NAME=CHECKPOINT_FOLDER."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback needs API keys."""
    port: int = 8000
    """Port to listen on."""
    api_keys_file: str | None = None
    """File with one API key a line; none = the environment's NANOCHAT_API_KEYS, separated by commas, or no keys."""
    cors_origins: tuple[str, ...] = ()
    """Origins (https://example.org) whose pages may call the endpoint; the chat page needs none."""

    backend: EngineName = "native"
    """Who computes: the engine of this project, or vLLM where it is installed (make vllm, or the extra vllm)."""
    max_running: int = 32
    """Requests of one model that are computed together on a replica."""
    kv_cache_tokens: int | None = None
    """Tokens whose keys and values a replica keeps, shared among its models; none = max_running of the longest."""
    dtype: Literal["auto", "bfloat16", "float32", "int8"] = "auto"
    """Compute dtype: auto (bfloat16 where the hardware has it), bfloat16, float32, or int8 (bfloat16, but the large
    linear layers in 8-bit integers: CPUs with AVX512-VNNI and AVX512-BF16; worth it from depth 12 on)."""
    compile: Literal["auto", "off"] = "auto"
    """torch.compile; auto = where a C++ compiler is there, on GPUs for vLLM alone. A machine's first start of a model
    takes some 20 s longer, later ones 5 s."""

    max_waiting: int = 64
    """Requests that may wait on a replica; beyond, they are refused with 429 and Retry-After."""
    first_token_s: float = 30.0
    """A request that has not been begun by then is refused with 429."""
    request_s: float = 600.0
    """A request that has not ended by then ends with an error."""
    stall_s: float = 60.0
    """A request that has begun and gets no token for so long ends with an error."""
    max_body_bytes: int = 1 << 19
    """Larger request bodies are refused: to tokenize so much stops all streams for 40 ms."""
    max_messages: int = 500
    """Messages of a conversation at most."""
    max_n: int = 16
    """Answers to one prompt, and prompts of one request, at most."""
    event_interval_s: float = 0.02
    """A stream gets at most one event in so many seconds; the first token is never held back."""
    log_contents: bool = False
    """Write prompts and answers into the log."""

    def __post_init__(self) -> None:
        found = below_least(
            self, port=0, max_running=1, kv_cache_tokens=1, max_waiting=0, first_token_s=0.001, request_s=0.001,
            stall_s=0.001, max_body_bytes=1024, max_messages=1, max_n=1, event_interval_s=0.0,
        )  # fmt: skip
        if not self.models:
            found.append("models: must name at least one model. For example --models sft")
        names = [model.partition("=")[0] for model in self.models]
        if twice := sorted({name for name in names if names.count(name) > 1} | {name for name in names if not name}):
            found.append(f"models={twice[0]}: every model needs a name of its own. Write NAME=CHECKPOINT_FOLDER.")
        if not self.port < 1 << 16:
            found.append(f"port={self.port}: must be below 65,536. 8000 is the default.")
        if self.dtype == "int8" and self.backend == "vllm":
            found.append("dtype=int8: is not for vLLM. Choose the native backend, or another dtype.")
        if "*" in self.cors_origins:
            found.append("cors_origins=*: would let every web page call the endpoint. Name the origins.")
        if found:
            raise ConfigError(" ".join(found))

    @property
    def is_loopback(self) -> bool:
        """Tell whether only this machine can reach the endpoint."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
