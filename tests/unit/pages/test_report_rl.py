import math
import re
import shutil
import statistics

import pytest
from test_report import Page, read
from tiny_run import HOSTILE, RL_METRICS, SCORES, rollout, score, write_rl

from nanochat import storage
from nanochat.pages.report import write_report
from nanochat.pages.report_rl import rl_charts, rl_figures

UPDATES = [record for record in RL_METRICS if "loss" in record]


@pytest.fixture
def run_dir(tmp_path):
    write_rl(str(tmp_path / "run"))
    return str(tmp_path / "run")


def section(run_dir):
    """The section on reinforcement learning of the run's page."""
    text = read(write_report(run_dir))
    return Page(re.findall(r'<section id="rl">.*?</section>', text, flags=re.DOTALL)[0])


def rewrite(run_dir, name, records):
    storage.remove(f"{run_dir}/rl/{name}")
    for record in records:
        storage.append_jsonl(f"{run_dir}/rl/{name}", record)


def test_the_numbers_are_those_of_the_records(run_dir):
    text = section(run_dir).text
    assert "From runs/x/step_000002 , practising arithmetic:two_step" in text
    assert "updates of 6 questions with 4 replies each, which have 256 tokens at most." in text
    error = f"{100 * math.sqrt(0.25 * 0.75 / 48):.2g} %"
    assert f"Right before 25.0 % \u00b1 {error}, n=48" in text
    assert f"Right after 3 updates 75.0 % \u00b1 {error}, n=48" in text
    assert f"Updates 3 of 3, {sum(record['samples'] for record in UPDATES)} samples" in text
    assert "Time in updates 3.0 min" in text
    rate = statistics.median(record["tokens_per_s"] for record in UPDATES[1:])
    assert f"Sampling, median {rate:.0f} tokens/s" in text
    assert "started" not in text
    assert "died" not in text


def test_charts_draw_every_record():
    pictures = {re.findall("<figcaption>(.*?)</figcaption>", picture)[0]: picture for picture in rl_charts(RL_METRICS)}
    counts = {title: [p.count(",") for p in re.findall(r'points="([^"]*)"', pic)] for title, pic in pictures.items()}
    assert counts == {
        "Reward, mean of the samples (dots: held-out problems)": [3, 3, 2],
        "Right on held-out problems": [2],
        "pass@k of the samples, upwards k = 1, 2, 4": [3, 3, 3],
        "Length of a completion (tokens)": [3],
        "Cut off before their end (share of the samples)": [3],
        "All rewards equal (share of the groups)": [3],
        "Staleness (updates; faint: the most)": [3, 3],
        "Mismatch (KL of sampling and learning)": [3],
        "Entropy (nats per token)": [3],
        "Learner waits (share of the time; faint: rollouts wait)": [3, 3],
        "Sampled tokens per second": [3],
    }
    assert "0.75 at step 3" in pictures["Reward, mean of the samples (dots: held-out problems)"]
    assert "75% at step 3" in pictures["Right on held-out problems"]
    assert "0.5 at step 2" in pictures["Staleness (updates; faint: the most)"], "the last line is the mean"
    assert "25% at step 2" in pictures["Learner waits (share of the time; faint: rollouts wait)"]


def test_rollouts_newest_first_with_what_they_got(run_dir):
    page = section(run_dir)
    places = [page.text.index(f"Best and worst of update {step}") for step in (2, 1, 0)]
    assert places == sorted(places)
    assert "best: reward 1, 37 tokens How many of 7? later yes" in page.text
    assert "worst: reward 0.125, 37 tokens, cut off How many of 7?" in page.text
    assert len([tag for tag, _ in page.tags if tag == "details"]) == 2


def test_a_run_that_only_practised_says_from_what(run_dir):
    assert "A chat model, made from runs/x/step_000002." in Page(read(write_report(run_dir))).text


def test_only_a_few_notes_are_shown(run_dir):
    storage.append_jsonl(f"{run_dir}/rl/samples.jsonl", {"step": 9, "samples": [rollout("best", 3, 1.0, "")]})
    text = section(run_dir).text
    assert re.findall(r"of update (\d)", text) == ["9", "2", "1"]
    assert "How many of 3? (no answer)" in text


def test_hostile_text_stays_text(run_dir):
    config = storage.read_json(f"{run_dir}/rl/config.json")
    config["config"]["rl"] |= {"task": HOSTILE, "held_out": HOSTILE}
    config["resolved"]["base"] = HOSTILE
    storage.write_json(f"{run_dir}/rl/config.json", config)
    hostile = {"which": HOSTILE, "question": HOSTILE, "reply": HOSTILE, "reward": HOSTILE, "tokens": HOSTILE}
    rewrite(run_dir, "samples.jsonl", [{"step": HOSTILE, "samples": [hostile]}])
    scores = {"step": 0, "held_out_pass_at_1": 0.5, "held_out_n": 4}
    rewrite(run_dir, "metrics.jsonl", [scores, {"step": 0, "loss": 1.0, "pass_at_<img>": 1.0, "reward": "<script>"}])
    page = section(run_dir)
    assert page.text.count(" ".join(HOSTILE.split())) == 8
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_a_run_without_the_stage_says_so(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("rl"))
    assert section(str(tmp_path / "run")).text == (
        "Reinforcement learning There is no rl/config.json: reinforcement learning has not begun."
    )


@pytest.mark.parametrize("records", [[], RL_METRICS[:1], RL_METRICS[:2]])
def test_a_stage_that_has_just_begun(run_dir, records):
    rewrite(run_dir, "metrics.jsonl", records)
    rewrite(run_dir, "samples.jsonl", [])
    rewrite(run_dir, "notes.jsonl", [])
    text = section(run_dir).text
    assert ("Right before 25.0 %" in text) is bool(records)
    assert ("There is no record in rl/metrics.jsonl yet" in text) is (not records)
    assert f"Updates {max(len(records) - 1, 0)} of 3, {24 if len(records) > 1 else 0} samples" in text
    assert "Right after" not in text
    assert "Best and worst" not in text


def test_values_that_are_none_are_left_out(run_dir):
    broken = dict.fromkeys(UPDATES[0], math.nan)
    with open(f"{run_dir}/rl/metrics.jsonl", "a") as file:
        file.write(
            '5\n{"step": 2, "loss": NaN, "reward": NaN, "samples": Infinity, "pass_at_x": null}\n{"loss": null}\n'
        )
        file.write('{"step": 5, "held_out_pass_at_1": 7.5, "held_out_n": 48}\n')
        file.write('{"step": 5, "held_out_pass_at_1": 0.5, "held_out_n": 0}\n{"step": 5, "held_')
    samples = [{"step": 3}, {"step": 3, "samples": {"a": "b"}}, {"step": 3, "samples": [7]}, {"samples": [{}]}]
    for record in samples:
        storage.append_jsonl(f"{run_dir}/rl/samples.jsonl", record)
    storage.append_jsonl(f"{run_dir}/rl/notes.jsonl", {"nothing": 1})
    text = section(run_dir).text
    assert "Right after 3 updates 75.0 %" in text
    assert f"Updates 3 of 3, {sum(record['samples'] for record in UPDATES)} samples" in text
    assert not re.search(r"\bnan\b", read(f"{run_dir}/report.html"))
    assert rl_figures([broken], [])["tokens_per_s"] is None
    assert "no values" in rl_charts([broken])[0]


def test_a_config_of_another_version(run_dir):
    storage.write_json(f"{run_dir}/rl/config.json", {"config": {}})
    assert "Right after 3 updates 75.0 %" in section(run_dir).text


def test_starts_and_deaths_are_counted(run_dir):
    died = "a rollout actor died with groups 3 to 9; another takes its place"
    for note in (died, "a worker group starts at step 1", died, died):
        storage.append_jsonl(f"{run_dir}/rl/notes.jsonl", {"note": note})
    text = section(run_dir).text
    assert "The learners were started 2 times. Rollout actors that died and were replaced: 3." in text
    assert rl_figures([UPDATES[0] | {"rollout_deaths": 2.0}], [])["deaths"] == 2, "those of a run without its notes"


def test_the_config_and_the_scores_have_the_stage(tiny_run, tmp_path):
    run_dir = str(tmp_path / "run")
    shutil.copytree(tiny_run, run_dir)
    chat = {"arithmetic": score(0.875, 80, SCORES["sft"]["chat"]["arithmetic"]["examples"]["right"], [])}
    storage.write_json(f"{run_dir}/evaluation/rl.json", SCORES["sft"] | {"chat": chat})
    text = Page(read(write_report(run_dir))).text
    assert "chance pretrain sft rl" in text
    assert text.index("sft is wrong") < text.index("rl is right")
    changed = text.split("Values other than the default are bold.")[1].split("The other")[0]
    assert re.findall(r"(?:rl|rollouts)\.\w+ \S+", changed) == [
        "rl.task arithmetic:two_step", "rl.num_steps 3", "rl.groups_per_step 6", "rl.samples_per_group 4",
        "rollouts.running 8",
    ]  # fmt: skip


def test_after_is_the_last_score_and_before_only_the_first():
    between = {"step": 2, "held_out_pass_at_1": 0.5, "held_out_n": 48}
    figures = rl_figures([*RL_METRICS[:-1], between, RL_METRICS[-1]], [])
    assert (figures["before"]["accuracy"], figures["after"]["accuracy"]) == (0.25, 0.75)
    assert rl_figures([between], [])["before"] is None
