import html
import re
import shutil
import statistics
from html.parser import HTMLParser

import pytest
from tiny_run import HOSTILE, METRICS

from nanochat import storage
from nanochat.pages.report import charts, config_rows, training_figures, usage_rows, write_report


class Page(HTMLParser):
    """Every tag with its attributes, and the text of the page without styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._style = [], [], False
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_data(self, data):
        if not self._style:
            self.texts.append(data)


def read(path):
    with storage.open_read(path) as file:
        return file.read().decode()


@pytest.fixture(scope="module")
def page(tiny_run, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("report") / "tiny"
    shutil.copytree(tiny_run, run_dir)
    return Page(read(write_report(str(run_dir))))


def test_the_header_has_the_numbers_of_the_metrics(page):
    steps = [record for record in METRICS if "loss" in record]
    assert f"Validation {METRICS[-1]['val_bpb']:.3f} bits per byte" in page.text
    assert f"Training loss {steps[-1]['loss']:.3f} nats per token" in page.text
    assert "Steps 6 of 10" in page.text
    assert "trained on 2.304k tokens of sayings in 3.0 min" in page.text
    assert "Peak memory 300 MB" in page.text
    assert "Waiting for data 0.3 % median" in page.text


def test_rates_are_medians_without_the_first_record():
    steps = [record for record in METRICS if "loss" in record]
    figures = training_figures(METRICS)
    assert figures["tokens_per_s"] == statistics.median(record["tokens_per_s"] for record in steps[1:]) == 103
    assert figures["flops_per_s"] == 10e9
    assert figures["mfu"] is None


def test_mfu_is_shown_where_it_is_known():
    assert training_figures([{"step": 0, "loss": 1.0, "mfu": 0.4}])["mfu"] == 0.4


def test_charts_draw_every_record():
    pictures = charts(METRICS)
    counts = [[line.count(",") for line in re.findall(r'points="([^"]*)"', picture)] for picture in pictures]
    assert counts == [[6, 6], [2], [6], [6]]
    assert "4.438 at step 6" in pictures[1]
    assert 'class="faint"' in pictures[0]


def test_samples_newest_first_with_prompts_in_bold(page):
    assert page.text.index("After step 6") < page.text.index("After step 3")
    assert "An early prompt gave this" in page.text
    assert ("b", {}) in page.tags


def test_hostile_samples_stay_text(page):
    assert HOSTILE.strip() in page.text
    assert "A prompt <b>" in page.text
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_is_self_contained(page):
    loading = [(tag, attributes) for tag, attributes in page.tags if {"src", "href"} & attributes.keys()]
    assert loading == []
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_data_figures_are_the_manifests(page, tiny_run):
    totals = storage.read_json(f"{tiny_run}/shards/manifest.json")["totals"]["train"]
    cells = f"train 1 {totals['documents']:,} {totals['rows']:,} {totals['tokens']:,}"
    assert cells in page.text
    assert f"{totals['text_bytes'] / totals['tokens']:.2f} {100 * totals['cropped_share']:.1f} %" in page.text


def test_compression_stands_beside_other_tokenizers(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    encodings = {
        "ours": {"vocab_size": 4096, "tokens": 100, "bytes_per_token": 3.456},
        "gpt2": {"vocab_size": 50257, "tokens": 80, "bytes_per_token": 4.0},
        "cl100k_base": {"skipped": "no answer <within> 5 s"},
    }
    report = {"documents": 2, "text_bytes": 345_600, "tokenizer_hash": "", "encodings": encodings}
    storage.write_json(str(tmp_path / "run/tokenizer/report.json"), report)
    text = Page(read(write_report(str(tmp_path / "run")))).text
    assert "on 346 kB of held-out text" in text
    table = "ours 4,096 3.46 gpt2 50,257 4.00 cl100k_base skipped: no answer <within> 5 s"
    assert f"tokenizer vocabulary bytes per token {table}" in text


def test_parameters_config_machine_and_starts(page, tiny_run):
    config = storage.read_json(f"{tiny_run}/pretrain/config.json")
    for kind, number in config["resolved"]["parameters"].items():
        assert f"{kind.replace('_', ' ')} {number:,}" in page.text
    assert f"torch version {config['versions']['torch']}" in page.text
    assert "a worker group starts at step 4" in page.text


def test_config_values_other_than_the_default_are_marked(tiny_run):
    rows = {name: changed for name, _, changed in config_rows(storage.read_json(f"{tiny_run}/pretrain/config.json"))}
    assert {name for name, changed in rows.items() if changed} == {
        "pretrain.depth", "pretrain.head_dim", "pretrain.n_embd", "pretrain.n_kv_head", "pretrain.window_pattern",
        "pretrain.num_steps", "pretrain.global_batch_tokens", "pretrain.warmup_steps", "pretrain.seed",
    }  # fmt: skip
    assert rows["pretrain.dtype"] is False


def test_a_noted_machine_is_shown(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    machine = {"device": "A <fast> CPU", "memory_bytes": 16 * 10**9}
    storage.write_json(str(tmp_path / "run/pretrain/machine.json"), machine)
    text = Page(read(write_report(str(tmp_path / "run")))).text
    assert "device A <fast> CPU memory bytes 16 GB" in text


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("", "Nothing has been trained in this run yet."),
        ("pretrain", "A chat model, made from"),
        ("pretrain/metrics.jsonl", "There is no record in pretrain/metrics.jsonl yet"),
        ("pretrain/samples.jsonl", "No samples have been drawn yet."),
        ("tokenizer/report.json", "There is no tokenizer/report.json: compression has not been compared."),
        ("shards/manifest.json", "There is no shards/manifest.json"),
        ("pretrain/config.json", "There is no pretrain/config.json"),
        ("", "No stage has written its config yet."),
    ],
)
def test_a_missing_part_is_named(tiny_run, tmp_path, missing, sentence):
    shutil.copytree(tiny_run, tmp_path / "run")
    storage.remove(str(tmp_path / "run" / missing))
    assert sentence in Page(read(write_report(str(tmp_path / "run")))).text


def test_a_run_that_has_only_evaluated(tmp_path):
    storage.append_jsonl(str(tmp_path / "pretrain/metrics.jsonl"), {"step": 0, "val_bpb": 3.5})
    text = Page(read(write_report(str(tmp_path)))).text
    assert "Validation 3.500 bits per byte" in text
    assert "no values" in text


def test_a_run_may_lie_on_a_uri():
    path = write_report("memory://runs/nothing")
    assert path == "memory://runs/nothing/report.html"
    assert html.unescape(read(path)).startswith("<!doctype html>")


def test_scores_stand_beside_chance_and_the_base_model(page):
    assert "arithmetic 25.0 % 1.2 % \u00b1 1.2 % n=80 93.8 % \u00b1 1.2 % n=80" in page.text
    assert "spelling 25.0 % - 50.0 % \u00b1 1.2 % n=64" in page.text
    assert "ChatCORE on 1 of 6 tasks 0 % - 0.3125" in page.text
    assert "CORE on 20 of 22 tasks, baselines 1 0 % - 0.0625" in page.text
    assert "CORE boolq 62.0 % - 56.2 % \u00b1 8.8 % n=32" in page.text
    assert "bits per byte - - 2.0625" in page.text


def test_three_right_and_three_wrong_are_shown_from_as_many_tasks_as_there_are(page):
    right = page.text.split("sft is right")[1].split("sft is wrong")[0]
    assert "arithmetic sum 0? [0+1 = 1] spelling spell? s p arithmetic sum 1? [1+1 = 2]" in right
    assert "sum 2?" not in right
    wrong = page.text.split("sft is wrong")[1].split("Fine-tuning")[0]
    assert "hard?" in wrong
    assert "spelling count? none expected: 42" in wrong
    assert "mumble" not in page.text, "the base model's mistakes are no news"


def test_fine_tuning_shows_what_it_inherits_and_how_it_went(page):
    section = page.text.split("Fine-tuning")[1]
    assert (
        "From runs/x/step_000006 , 2 steps of 3 rows. Not given, and so the base model's: matrix_lr 0.0375." in section
    )
    assert "Right on held-out arithmetic" in section
    assert "Answers after step 2 Who are you?" in section
    assert "sft.mixture" in page.text


def test_a_run_without_scores_says_how_to_get_them(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "tiny")
    for stage in ("sft", "rl", "evaluation"):
        shutil.rmtree(tmp_path / "tiny" / stage)
    text = Page(read(write_report(str(tmp_path / "tiny")))).text
    assert "Nothing has been scored yet: run ray_jobs/evaluate.py" in text
    assert "fine-tuning has not begun" in text


def test_what_a_stage_took_is_summed_over_restarts_and_kinds_of_nodes(tiny_run, tmp_path):
    lap = {"elapsed_s": 60.0, "waiting_s": 6.0, "working_s": {"train": 110.0, "data": 1.0}, "idle_s": {"head": 60.0}}
    records = [{"stage": "data"} | lap | {"cost": 1.0}, *[{"stage": "pretrain"} | lap | {"cost": 2.5}] * 2]
    data, pretrain, every = usage_rows(records)
    assert data == {
        "stage": "data", "elapsed_s": 60, "waiting_s": 6, "working_s": 111, "idle_s": 60, "cost": 1.0
    }  # fmt: skip
    assert (pretrain["stage"], pretrain["elapsed_s"], pretrain["working_s"], pretrain["cost"]) == (
        "pretrain",
        120,
        222,
        5,
    )
    assert (every["stage"], every["elapsed_s"], every["cost"]) == ("all", 180, 6)
    unpriced = usage_rows([*records, {"stage": "pretrain"} | lap | {"cost": None}])
    assert [row["cost"] for row in unpriced] == [1.0, None, None]
    assert usage_rows([]) == []
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run, run_dir)
    assert "Time and cost" not in Page(read(write_report(str(run_dir)))).text
    for record in records:
        storage.append_jsonl(f"{run_dir}/usage.jsonl", record)
    assert "pretrain 2.0 min 12 s 3.7 min 2.0 min 5.00" in Page(read(write_report(str(run_dir)))).text
