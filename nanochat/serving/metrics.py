"""What the endpoint does to Prometheus, under vLLM's names where it has one, so that its dashboards work.

Source of the names: vLLM docs, "Production Metrics".
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from nanochat.serving.answers import Answers
from nanochat.serving.backend import Backend

FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 30)
TOKEN_S = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 5)
REQUEST_S = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 60, 120, 300, 600)


class Metrics:
    """Counts of one app."""

    def __init__(self, backend: Backend) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_LoadCollector(backend))
        label = {"labelnames": ["model_name"], "registry": self.registry}
        self.prompt = Counter("vllm:prompt_tokens", "Tokens of prompts", **label)
        self.generation = Counter("vllm:generation_tokens", "Tokens of answers", **label)
        self.success = Counter(
            "vllm:request_success", "Answers that ended", ["model_name", "finished_reason"], registry=self.registry
        )
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds", "Until the first token", buckets=FIRST_TOKEN_S, **label
        )
        self.per_token = Histogram(
            "vllm:request_time_per_output_token_seconds", "From token to token, by answer", buckets=TOKEN_S, **label
        )
        self.latency = Histogram("vllm:e2e_request_latency_seconds", "Until the last token", buckets=REQUEST_S, **label)
        self.responses = Counter(
            "nanochat:http_responses", "Responses by status", ["path", "status"], registry=self.registry
        )

    def count(self, answers: Answers, elapsed_s: float) -> None:
        """Count a request that has ended, whole or not."""
        name = answers.model.name
        tokens = sum(answers.completion_tokens) - sum(request.continued for request in answers.requests)
        self.prompt.labels(name).inc(answers.prompt_tokens)
        self.generation.labels(name).inc(tokens)
        if answers.first_token_s is not None:
            self.first_token.labels(name).observe(answers.first_token_s)
            each = tokens / len(answers.requests)
            if each > 1:
                self.per_token.labels(name).observe((elapsed_s - answers.first_token_s) / (each - 1))
        self.latency.labels(name).observe(elapsed_s)
        for reason in answers.finish_reasons:
            self.success.labels(name, reason or "abort").inc()

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _LoadCollector(Collector):
    """What the backend says of itself, read when it is asked for."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def collect(self) -> Iterator[Any]:
        """Yield the families."""
        load = self.backend.load()
        used = 1 - load.kv_tokens_free / load.kv_tokens if load.kv_tokens else 0.0
        for name, help, value in (
            ("num_requests_running", "Requests that are computed", load.running),
            ("num_requests_waiting", "Requests that wait for room", load.waiting),
            ("kv_cache_usage_perc", "Share of the cache that requests hold, 0 to 1", used),
        ):
            yield GaugeMetricFamily(f"vllm:{name}", help, value)
        for name, help, value in (
            ("num_preemptions", "Requests that gave their memory back", load.preemptions),
            ("prefix_cache_queries", "Tokens of prompts that were looked up", load.prefix_queries),
            ("prefix_cache_hits", "Tokens of prompts that were found", load.prefix_hits),
        ):
            yield CounterMetricFamily(f"vllm:{name}", help, value)
