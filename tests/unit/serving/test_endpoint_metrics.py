"""What the endpoint counts is what it did, and what the dashboard shows is there."""

import json
import re
from pathlib import Path
from types import MappingProxyType

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanochat.config.serving import ServingConfig
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.inference.requests import Load, Request
from nanochat.serving.answers import Admission, Answers
from nanochat.serving.backend import ServedModel
from nanochat.serving.metrics import Metrics

DASHBOARD = Path(__file__).parents[3] / "grafana_dashboard.json"
MODEL = ServedModel("m", Tokenizer([], SPLIT_PATTERNS["nanochat"]), True, 64, 0, "")


class Idle:
    """A backend that does nothing."""

    models = MappingProxyType({"m": MODEL})
    is_healthy = True

    def load(self) -> Load:
        return Load(
            running=3, waiting=2, kv_tokens=100, kv_tokens_free=75, preemptions=4, prefix_queries=50, prefix_hits=30
        )


def values(metrics: Metrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = "".join(f"[{value}]" for name, value in sample.labels.items() if name != "model_name")
            found[sample.name + labels] = sample.value
    return found


def test_a_request_is_counted_once_with_its_times():
    backend = Idle()
    metrics = Metrics(backend)  # type: ignore[arg-type]
    requests = [Request(prompt=(1, 2, 3), max_new_tokens=20) for _ in range(2)]
    answers = Answers(Admission(backend, ServingConfig()), MODEL, requests, [], 2)  # type: ignore[arg-type]
    answers.first_token_s, answers.completion_tokens, answers.finish_reasons = 0.03, [11, 11], ["stop", None]
    metrics.count(answers, elapsed_s=1.03)
    found = values(metrics)
    assert found["vllm:prompt_tokens_total"] == 3, "two answers to one prompt"
    assert found["vllm:generation_tokens_total"] == 22
    assert found["vllm:time_to_first_token_seconds_sum"] == pytest.approx(0.03)
    assert found["vllm:request_time_per_output_token_seconds_sum"] == pytest.approx(0.1)
    assert found["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(1.03)
    assert found["vllm:request_success_total[stop]"] == found["vllm:request_success_total[abort]"] == 1


def test_the_load_is_the_backends():
    found = values(Metrics(Idle()))  # type: ignore[arg-type]
    assert found["vllm:num_requests_running"] == 3
    assert found["vllm:num_requests_waiting"] == 2
    assert found["vllm:kv_cache_usage_perc"] == 0.25
    assert found["vllm:num_preemptions_total"] == 4
    assert found["vllm:prefix_cache_hits_total"] / found["vllm:prefix_cache_queries_total"] == 0.6


def test_every_metric_of_the_dashboard_is_there():
    metrics = Metrics(Idle())  # type: ignore[arg-type]
    told = metrics.text().decode()
    known = set(re.findall(r"^# TYPE (\S+)", told, re.MULTILINE))
    dashboard = json.loads(DASHBOARD.read_text())
    exprs = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for expr in exprs for name in re.findall(r"(?:vllm|nanochat):\w+", expr)}
    assert len(asked) > 8
    assert {name.removesuffix("_bucket") for name in asked} <= known
