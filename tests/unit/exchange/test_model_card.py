import ast
import copy
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from nanochat import storage
from nanochat.config.model import STOCK, ModelConfig
from nanochat.data import corpora
from nanochat.errors import DamagedFileError, excerpt
from nanochat.exchange.model_card import (
    TrainedStage,
    environment,
    exported_parameters,
    inert,
    lineage,
    model_card,
    parts_of,
    sources,
    weaknesses,
)
from nanochat.model.gpt import GPT
from nanochat.storage import RunFolder
from nanochat.tasks import registry
from nanochat.training.checkpoint import Checkpoint, CheckpointWriter, step_folder

sys.path.append(str(Path(__file__).parents[1] / "pages"))
from tiny_run import SCORES, STEP, score, write_tiny_run

HOSTILE = (
    "<img src=x onerror=alert(1)> \u202e\x1b[31m | ` **bold** [a](javascript:alert(2)) ![b](http://evil.test/x.png) "
    "www.evil.test https://evil.test &lt;b&gt; {{ 7 * 7 }} {% x %} $$x$$ ~~gone~~ \\| \\` \n\n# Heading\n---\n"
    "license: mit"
)


class Page(HTMLParser):
    """The tags of rendered Markdown with their attributes, and its text, a bar behind each cell."""

    def __init__(self, card):
        super().__init__()
        self.tags, self.text = [], ""
        body = card.split("---\n", 2)[2]
        self.feed(MarkdownIt("commonmark").enable("table").render(body))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(attrs)))

    def handle_endtag(self, tag):
        self.text += " | " if tag == "td" else ""

    def handle_data(self, data):
        self.text += data


def metadata(card):
    return yaml.safe_load(card.split("---\n", 2)[1])


def edited(path, change):
    """Change a JSON file in place."""
    value = storage.read_json(str(path))
    change(value)
    storage.write_json(str(path), value)


def save(folder, step, source, stage):
    """Write a checkpoint of a stage with weights of its own."""
    state = {name: source.state[name] for name in ("plan", "model")} | {"stage": stage}
    weights = {"weight": torch.full((3,), 10.0 * step + len(stage))}
    writer = CheckpointWriter(str(folder), rank=0, world_size=1, keep=9, attempt="a")
    writer.save(step, weights, {}, state)
    writer.wait()
    return Checkpoint(step_folder(str(folder), step))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that went through all stages, each from the checkpoint of the one before, scored and paid for."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    write_tiny_run(str(run), tmp_path_factory.mktemp("text"))
    base = Checkpoint(step_folder(f"{run}/pretrain/checkpoints", STEP))
    edited(run / "pretrain/checkpoints" / f"step_{STEP:06d}" / "state.json", lambda state: state.update(stage={}))
    shape = {"model": base.state["model"], "flops_per_token": 5000}
    sft = save(run / "sft/checkpoints", 2, base, {"base_sha256": base.weights_sha256})
    edited(run / "sft/config.json", lambda config: config["resolved"].update(
        shape, base=base.folder, base_sha256=base.weights_sha256
    ))  # fmt: skip
    rl = save(run / "rl/checkpoints", 3, base, {"base_sha256": sft.weights_sha256, "more": 1})
    edited(run / "rl/config.json", lambda config: config["resolved"].update(
        shape, base=sft.folder, base_sha256=sft.weights_sha256
    ))  # fmt: skip
    records = storage.read_jsonl(f"{run}/rl/metrics.jsonl")
    storage.remove(f"{run}/rl/metrics.jsonl")
    for record in records:
        storage.append_jsonl(f"{run}/rl/metrics.jsonl", record | {"learner_positions": 1000.0 + record["step"]})
    storage.write_json(f"{run}/sft/shards/manifest.json", {
        "recipe": {"sequence_len": 192, "vocab_size": 300}, "shards": [],
        "totals": {
            "validation": {"rows": 1, "documents": 1, "tokens": 1, "text_bytes": 1},
            "train": {"rows": 12, "documents": 77, "tokens": 2222, "text_bytes": 4444},
        },
    })  # fmt: skip
    for name, checkpoint in (("pretrain", base), ("sft", sft), ("rl", rl)):
        scores = SCORES["sft" if name == "rl" else name] | {"weights": checkpoint.weights_sha256}
        storage.write_json(f"{run}/evaluation/{name}.json", scores)
        storage.write_json(f"{run}/{name}/machine.json", {"device": f"device of {name}", "workers": 3})
        storage.append_jsonl(f"{run}/usage.jsonl", {
            "stage": name, "elapsed_s": 100.0, "waiting_s": 5.0, "working_s": {"node": 95.0},
            "idle_s": {"node": 5.0}, "cost": 1.25,
        })  # fmt: skip
    return run


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it that a test may change."""
    copied = tmp_path / "tiny"
    shutil.copytree(whole, copied)
    for config in (copied / "sft/config.json", copied / "rl/config.json"):
        config.write_text(config.read_text().replace(str(whole), str(copied)))
    return copied


def checkpoint_of(run, stage):
    return Checkpoint(step_folder(f"{run}/{stage}/checkpoints", {"pretrain": STEP, "sft": 2, "rl": 3}[stage]))


def page_of(run, stage, stock=False):
    return Page(model_card(str(run), checkpoint_of(run, stage), stock))


def test_the_card_of_a_base_model_has_the_numbers_of_its_stage_alone(run):
    text = page_of(run, "pretrain").text
    config = ModelConfig(**checkpoint_of(run, "pretrain").state["model"])
    count = sum(
        (one[: config.vocab_size] if name.endswith(("wte.weight", "lm_head.weight")) or "value_embeds" in name else one)
        .numel() for name, one in GPT(config).named_parameters()
    )  # fmt: skip
    assert config.padded_vocab_size > config.vocab_size == 300
    assert f"A base model of {count:,} parameters" in text
    flops = 2304 * storage.read_json(f"{run}/pretrain/config.json")["resolved"]["flops_per_token"]
    assert f"pretraining | 6 | 2,304 | {flops:.3g} | 3.0 min | 4.4375 | device of pretrain, workers: 3 |" in text
    train = storage.read_json(f"{run}/shards/manifest.json")["totals"]["train"]
    assert f"pretraining | {train['documents']} | {train['tokens']:,} | {train['text_bytes'] / 1e3:.3g} kB |" in text
    assert f"pretraining | sayings | {12 / train['rows']:.3g} passes | unknown" in text
    assert "layers | 2, each 32 channels wide" in text
    assert "2 of queries, 1 of keys and values, 16 channels each" in text
    assert "vocabulary | 300 tokens" in text
    assert "context | 192 tokens" in text
    assert "windows SL" in text
    config = storage.read_json(f"{run}/pretrain/config.json")
    versions = config["versions"]
    assert f"on Ray {versions['nanochat']}, torch {versions['torch']}, commit {config['commit'] or 'unknown'}." in text
    assert "not trained to answer" in text
    assert "fine-tuning |" not in text.split("Time and cost")[0]


def test_the_card_of_a_chat_model_has_all_stages_that_made_it(run):
    text = page_of(run, "rl").text
    assert "update 3 of reinforcement learning" in text
    assert "pretraining, then fine-tuning, then reinforcement learning" in text
    assert "fine-tuning | 2 | 1,152 | 5.76e+06 | unknown | 0.6250 | device of sft" in text
    assert "reinforcement learning | 3 | 3,003 | 1.5e+07 | 3.0 min | not measured | device of rl" in text
    total = 2304 * storage.read_json(f"{run}/pretrain/config.json")["resolved"]["flops_per_token"] + 4155 * 5000
    assert f"these together | | | {total:.3g} |" in text
    assert "fine-tuning | arithmetic | 0.5 passes | MIT" in text
    assert "fine-tuning | identity | 1 passes | MIT" in text
    assert "reinforcement learning | arithmetic:two_step | 84 replies sampled | MIT" in text
    assert "fine-tuning | 77 conversations | 2,222 | 4.44 kB, what the assistant says" in text
    assert "before: 25.0 % \u00b1 6.2 % (n=48), after update 3: 75.0 % \u00b1 6.2 % (n=48)." in text
    assert "all | 5.0 min | 4.8 min | 15 s | 3.75 dollars" in text


@pytest.mark.parametrize(
    ("file", "old", "new", "before", "after"),
    [
        ("pretrain/metrics.jsonl", "4.4375", "3.4375", "4.4375 |", "3.4375 |"),
        ("pretrain/metrics.jsonl", '"training_s": 180.0', '"training_s": 240.0', "3.0 min | 4.4", "4.0 min | 4.4"),
        ("pretrain/config.json", '"rows_per_step": 2', '"rows_per_step": 4', "| 2,304 |", "| 4,608 |"),
        ("pretrain/machine.json", "device of pretrain", "a GPU", "device of pretrain", "a GPU, workers"),
        ("shards/config.json", "sayings", "other1", "sayings", "other1"),
        ("sft/config.json", '"flops_per_token": 5000', '"flops_per_token": 6000', "5.76e+06", "6.91e+06"),
        ("sft/config.json", '"identity*2"', '"smoltalk~0.25"', "identity | 1 passes | MIT",
         "smoltalk | 25.0 % of the mixture | Apache-2.0"),
        ("sft/shards/manifest.json", '"rows": 12', '"rows": 24', "arithmetic | 0.5 p", "arithmetic | 0.25 p"),
        ("sft/metrics.jsonl", "0.625", "0.875", "| 0.6250 |", "| 0.8750 |"),
        ("rl/metrics.jsonl", '"learner_positions": 1002.0', '"learner_positions": 2002.0', "| 3,003 |", "| 4,003 |"),
        ("rl/metrics.jsonl", '"held_out_pass_at_1": 0.75', '"held_out_pass_at_1": 0.5', "3: 75.0 %", "3: 50.0 %"),
        ("rl/config.json", '"task": "arithmetic:two_step"', '"task": "gsm8k=/x/gsm"', "arithmetic:two_step | 84",
         "gsm8k=gsm | 84"),
        ("usage.jsonl", '"working_s": {"node": 95.0}', '"working_s": {"node": 1200.0}', "4.8 min", "60.0 min"),
        ("usage.jsonl", '"cost": 1.25', '"cost": null', "3.75 dollars", "unknown: nodes without a price"),
        ("evaluation/rl.json", '"accuracy": 0.9375', '"accuracy": 0.8125', "81.2 % \u00b1 1.2 % (n=80)", None),
        ("evaluation/rl.json", '"n": 64', '"n": 65', "(n=65)", None),
        ("evaluation/rl.json", '"stderr": 0.0875', '"stderr": 0.0775', "7.8 % (n=32)", None),
        ("evaluation/rl.json", '"bits_per_byte": 2.0625', '"bits_per_byte": 2.5', "bits per byte | - | - | 2.0625 | "
         "2.0625", "bits per byte | - | - | 2.0625 | 2.5000"),
    ],
)  # fmt: skip
def test_what_a_file_says_is_what_the_card_says(run, file, old, new, before, after):
    path = run / file
    unchanged, content = page_of(run, "rl").text, path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))
    changed = page_of(run, "rl").text
    if after is None:
        before, after = "never there", before
    assert before in unchanged or before == "never there"
    assert after not in unchanged
    assert after in changed
    assert before not in changed


def test_an_early_checkpoint_is_not_credited_with_what_came_after_it(run):
    early = save(run / "pretrain/checkpoints", 3, checkpoint_of(run, "pretrain"), {})
    text = Page(model_card(str(run), early, stock=False)).text
    assert "pretraining | 3 | 1,152 |" in text
    assert "| 1.5 min |" in text
    assert "| not measured | device of pretrain" in text, "no score was at this step"
    assert "None is of the model of this card" in text


def test_a_base_model_is_not_charged_for_what_was_made_of_it(run):
    assert "3.75 dollars" in page_of(run, "rl").text
    text = page_of(run, "pretrain").text
    assert "pretrain | 1.7 min | 1.6 min | 5 s | 1.25 dollars" in text
    assert "all | 1.7 min | 1.6 min | 5 s | 1.25 dollars" in text


def test_scores_of_other_weights_are_shown_but_are_not_the_models(run):
    card = model_card(str(run), checkpoint_of(run, "rl"), stock=False)
    assert "The model of this card is rl." in card
    results = metadata(card)["model-index"][0]["results"]
    assert [(one["dataset"]["name"], one["metrics"][0]["value"]) for one in results] == [
        ("arithmetic", 0.9375), ("spelling", 0.5)
    ]  # fmt: skip
    edited(run / "evaluation/rl.json", lambda found: found.update(weights="others"))
    card = model_card(str(run), checkpoint_of(run, "rl"), stock=False)
    assert "93.8 %" in card
    assert "None is of the model of this card" in card
    assert "what they are bad at is not measured" in card
    assert "model-index" not in metadata(card)


def test_the_hub_reads_the_metadata(run):
    data = ModelCard(model_card(str(run), checkpoint_of(run, "sft"), stock=False)).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", None)
    assert data.tags == ["nanochat", "nanochat-on-ray", "conversational"]
    assert data.model_name == "tiny-sft"
    assert [(one.dataset_type, one.metric_type, one.metric_value, one.metric_args) for one in data.eval_results] == [
        ("arithmetic", "accuracy", 0.9375, {"n": 80, "stderr": 0.0125}),
        ("spelling", "accuracy", 0.5, {"n": 64, "stderr": 0.0125}),
    ]


def scored(**accuracies):
    """Return a model's scores by task: accuracy, standard error and chance."""
    return {"m": {"chat": {
        name: score(accuracy, 100, [], []) | {"stderr": error, "chance": chance}
        for name, (accuracy, error, chance) in accuracies.items()
    }}}  # fmt: skip


def test_what_a_model_is_bad_at_follows_from_its_scores():
    found = weaknesses(scored(
        below=(0.2, 0.01, 0.25), at=(0.3125, 0.03125, 0.25), above=(0.34375, 0.03125, 0.25), half=(0.625, 0.01, 0.25),
        nothing=(0.0, 0.0, 0.0), something=(0.25, 0.01, 0.0), good=(0.9, 0.01, 0.25),
    ))  # fmt: skip
    assert [one["name"] for one in found["at_chance"]] == ["below", "at", "nothing"]
    assert [one["name"] for one in found["low"]] == ["above", "something"]
    assert found["scored"]
    assert not weaknesses({})["scored"]
    assert not weaknesses({"m": {"chat": {}, "bits_per_byte": 1.0}})["scored"]


def test_the_card_names_what_the_model_is_bad_at(run):
    text = page_of(run, "pretrain").text
    bad = text.split("What it is bad at")[1]
    assert "No better than a guess" in bad
    assert "on arithmetic: 1.2 % \u00b1 1.2 % (n=80), a guess gets 25.0 %" in bad
    assert "less than half" not in bad
    bad = page_of(run, "rl").text.split("What it is bad at")[1]
    assert re.search(r"less than half.*on spelling: 50.0 %.*on ChatCORE on 1 of 6 tasks: 0.3125", bad, re.DOTALL)
    assert "on arithmetic" not in bad
    assert "trained on rows of 192 tokens" in bad
    assert "no safety training" in bad
    for name in ("pretrain", "sft", "rl"):
        edited(run / f"evaluation/{name}.json", lambda found: found["chat"].pop("spelling", None))
        edited(run / f"evaluation/{name}.json", lambda found: (found.pop("core", None), found.pop("chat_core", None)))
    assert "more than half of the way" in page_of(run, "rl").text


def test_a_chat_model_and_a_base_model_are_asked_differently(run):
    for stage, has, lacks in (("sft", "apply_chat_template", "France"), ("pretrain", "France", "apply_chat_template")):
        card = model_card(str(run), checkpoint_of(run, stage), stock=True)
        assert f"--run-dir runs/imported --models {stage}\n" in card
        assert ("conversational" in metadata(card)["tags"]) is (stage == "sft")
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        ast.parse(code)
        assert has in code
        assert lacks not in code


def test_the_commands_are_those_of_the_architecture(run):
    checkpoint = checkpoint_of(run, "sft")
    stock, full = (model_card(str(run), checkpoint, stock=stock) for stock in (True, False))
    assert "trust_remote_code" not in stock
    assert "$ vllm serve FOLDER --model-impl transformers\n" in stock
    assert "NanoChatForCausalLM" in stock
    assert full.count('("FOLDER", trust_remote_code=True)') == 2
    ours = "PATH_OF_NANOCHAT_ON_RAY"
    assert f"$ pip install -c {ours}/constraints-vllm.txt -e {ours}\n$ vllm serve FOLDER\n" in full
    assert "--model-impl" not in full
    assert "NanoChatForCausalLM" not in full


def test_parts_are_named_if_and_only_if_the_model_has_them():
    assert parts_of(ModelConfig()) == ["value embeddings", "residual scalars", "backout", "windows SSSL"]
    assert parts_of(ModelConfig(**STOCK)) == []
    assert parts_of(ModelConfig(**STOCK | {"smear": True})) == ["smear"]


def test_the_settings_of_the_models_own_scores_are_shown_once(run):
    assert "Scored with" not in page_of(run, "rl").text
    for name, samples in (("sft", 1), ("rl", 4)):
        edited(run / f"evaluation/{name}.json", lambda found, samples=samples: [
            one.update(settings={"max_per_task": None, "samples": samples}) for one in found["chat"].values()
        ])  # fmt: skip
    text = page_of(run, "rl").text
    assert text.count("Scored with") == 1
    assert "Scored with max_per_task none, samples 4." in text


def test_padding_of_the_vocabulary_is_no_parameter_of_the_export():
    exact, padded = ModelConfig(vocab_size=320, n_layer=3), ModelConfig(vocab_size=300, n_layer=3)
    assert exported_parameters(exact) - exported_parameters(padded) == 20 * 768 * (2 + 2)


def test_every_named_source_has_a_licence_and_no_file_of_ones_own_has():
    assert {name for name in registry.LOADERS if registry.licence_of(name) is None} == {"messages"}
    assert registry.LICENCES.keys() <= registry.LOADERS.keys()
    assert registry.licence_of("gsm8k:train") == "MIT"
    assert registry.licence_of("gsm8k=/mine") is registry.licence_of("no task") is registry.licence_of("") is None
    assert corpora.licence_of("climbmix") == "CC-BY-NC-4.0"
    assert all(corpora.licence_of(name) for name in ("pydocs", *corpora.RECIPES))
    assert corpora.licence_of("/my/pydocs") is None


def test_licences_and_homes_of_public_data_are_shown_and_folders_of_ones_own_are_not(run):
    edited(run / "shards/config.json", lambda found: found["config"]["corpus"].update(corpus="climbmix"))
    edited(run / "sft/config.json", lambda found: found["config"]["sft"].update(
        mixture=["messages=/home/me/secret/chats.jsonl*3", "identity", "arc_easy", "gsm8k=/home/me/secret", "b@d=/a/b"],
        identity="/home/me/secret/character.toml",
    ))  # fmt: skip
    edited(run / "rl/config.json", lambda found: found["config"]["rl"].update(
        task="gsm8k=/home/me/secret/files:train", held_out="gsm8k=/home/me/secret/files:val"
    ))  # fmt: skip
    card = model_card(str(run), checkpoint_of(run, "rl"), stock=False)
    text = Page(card).text
    home = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle"
    assert f"climbmix ({home}) |" in text
    assert (("a", (("href", home),))) in Page(card).tags
    assert "| CC-BY-NC-4.0 |" in text
    assert "arc_easy | 0.5 passes | CC-BY-SA-4.0" in text
    assert "messages: chats.jsonl | 1.5 passes | unknown" in text
    assert "identity: character.toml | 0.5 passes | unknown" in text
    assert "gsm8k: secret | 0.5 passes | unknown" in text
    assert "gsm8k=files:train | 84 replies sampled | unknown" in text
    assert "b@d=b | unknown | unknown" in text
    assert "/home/me" not in card.replace("\\", "")
    assert str(run.parent) not in card.replace("\\", "")


def hostile_copy(run, into, text):
    """Copy a run with a text wherever one can stand; file names have no slash and are short."""
    name = text.replace("/", "_")[:100]
    shutil.copytree(run, into := into / name)
    edited(into / "shards/config.json", lambda found: found["config"]["corpus"].update(corpus=f"/data/{text}"))
    for stage in ("pretrain", "sft", "rl"):
        edited(into / stage / "machine.json", lambda found: found.update(device=text, workers=text))
        edited(into / stage / "config.json", lambda found: found.update(versions={"nanochat": text}, commit=text))
    edited(into / "sft/config.json", lambda found: found["config"]["sft"].update(mixture=[text, f"gsm8k={text}"]))
    edited(into / "rl/config.json", lambda found: found["config"]["rl"].update(task=text, held_out=text))
    found = copy.deepcopy(storage.read_json(f"{into}/evaluation/rl.json"))
    one = found["chat"]["spelling"] | {"settings": {text: text}, "n": text}
    found |= {
        "chat": {text: one},
        "core": found["core"] | {"title": text, "tasks": {text: found["core"]["tasks"]["boolq"]}},
    }
    found["chat_core"] |= {"title": f"{text} 2"}
    (into / "evaluation/rl.json").unlink()
    storage.write_json(f"{into}/evaluation/{name}.json", found)
    record = storage.read_jsonl(f"{into}/usage.jsonl")[0]
    storage.append_jsonl(f"{into}/usage.jsonl", record | {"stage": text})
    return into


def test_nothing_that_a_run_says_can_change_the_form_of_the_card(run, tmp_path):
    cards = []
    for number, text in enumerate(("plain", HOSTILE)):
        (tmp_path / str(number)).mkdir()
        copied = hostile_copy(run, tmp_path / str(number), text)
        cards.append(model_card(str(copied), checkpoint_of(copied, "rl"), stock=False))
    plain, hostile = map(Page, cards)
    assert hostile.tags == plain.tags
    whole = excerpt(HOSTILE)
    assert hostile.text.count(whole[:90]) >= 15
    for shown in ("<img src=x onerror=alert(1)>", "{{ 7 * 7 }}", "&lt;b&gt;", "\\u202e\\x1b[31m", "**bold**"):
        assert shown in hostile.text
    forms = [metadata(card) for card in cards]
    assert [list(form) for form in forms] == [["library_name", "pipeline_tag", "tags", "model-index"]] * 2
    assert forms[1]["model-index"][0]["name"] == excerpt(HOSTILE.replace("/", "_")[:100] + "-rl")
    assert forms[1]["model-index"][0]["results"][0]["dataset"] == {"type": whole, "name": whole}
    for escaped in ("www.evil", "https://evil", "http://evil", "$$"):
        assert escaped not in cards[1].split("---\n", 2)[2], "what more than CommonMark makes of it"
    cards[1].encode("utf-8")


@pytest.mark.parametrize("mark", [chr(code) for code in range(33, 127) if not chr(code).isalnum()])
def test_every_punctuation_mark_means_nothing(mark):
    rendered = (
        MarkdownIt("commonmark").enable("table").render(f"| a |\n|---|\n| {inert(f'x {mark}y{mark} {mark * 3}')} |")
    )
    assert inert(mark) == f"\\{mark}"
    page = Page(f"---\n---\n{inert(f'{mark} y{mark}')}")
    assert page.tags == [("p", ())]
    assert page.text.strip() == f"{mark} y{mark}"
    assert re.findall(r"<(\w+)", rendered) == ["table", "thead", "tr", "th", "tbody", "tr", "td"]


def test_a_filter_says_unknown_of_nothing_and_a_text_stays_one_line():
    template = environment().from_string("{{ a | count }} {{ a | bytes }} {{ a }} {{ b | count }} {{ c }}")
    assert template.render(a=None, b=1234567, c="x\n- y") == "unknown unknown unknown 1,234,567 x \\- y"


def test_a_checkpoint_without_a_run_gives_a_card_that_says_what_is_unknown(run, tmp_path):
    alone = save(tmp_path / "empty/pretrain/checkpoints", 5, checkpoint_of(run, "pretrain"), {})
    edited(Path(alone.folder) / "state.json", lambda state: state["model"].update(n_layer=3))
    text = Page(model_card(str(tmp_path / "empty"), alone, stock=False)).text
    assert "layers | 3, each 32 channels wide" in text
    assert "pretraining | 5 | unknown | unknown | unknown | not measured | unknown" in text
    assert "pretraining | unknown | unknown | unknown" in text
    assert "The size of the training text is unknown." in text
    assert "Not measured: the run has no account of its nodes." in text
    assert re.search(r"Scores\s+Not measured\.", text)
    assert "what they are bad at is not measured" in text
    assert "context | 192 tokens" in text
    shutil.copytree(alone.folder, tmp_path / "step_000005")
    text = Page(model_card(str(tmp_path / "nowhere"), Checkpoint(str(tmp_path / "step_000005")), stock=True)).text
    assert "stages | unknown" in text
    assert "The sources are unknown, and so are their licences." in text
    assert "Tokens seen, FLOPs, time and validation are unknown" in text
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "gone",
    ["pretrain/config.json", "pretrain/metrics.jsonl", "shards", "sft/config.json", "sft/metrics.jsonl", "sft/shards",
     "rl/config.json", "rl/metrics.jsonl", "rl/machine.json", "evaluation", "usage.jsonl", "tokenizer"],
)  # fmt: skip
def test_a_run_without_one_of_its_parts_has_a_card(run, gone):
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for stage in ("pretrain", "sft", "rl"):
        assert "What it is bad at" in page_of(run, stage).text


def imported(folder, source, step, stage):
    """Write what an import leaves: a checkpoint and a config that know nothing of the training."""
    resolved = {"rows_per_step": None, "flops_per_token": None, "base": "a foreign <model>"}
    config = {"import": {"source": "/home/me"}, stage: {"origin": "a foreign <model>", "mixture": []}}
    storage.write_json(f"{folder}/{stage}/config.json", {"config": config, "resolved": resolved, "versions": {
        "nanochat": "7.7"
    }})  # fmt: skip
    kind = {"base_sha256": None} if stage == "sft" else {}
    return save(folder / stage / "checkpoints", step, source, kind | {"imported": {"origin": "a foreign <model>"}})


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_an_imported_model_is_not_said_to_have_been_trained_here(run, tmp_path, stage):
    checkpoint = imported(tmp_path / "new", checkpoint_of(run, "pretrain"), 1, stage)
    text = Page(model_card(str(tmp_path / "new"), checkpoint, stock=True)).text
    title = {"pretrain": "pretraining", "sft": "fine-tuning"}[stage]
    assert "imported into nanochat on Ray: a foreign <model>." in text
    assert f"stages | {title} elsewhere (a foreign <model>) |" in text
    assert f"{title} | unknown | unknown | unknown | unknown | not measured | unknown" in text
    assert f"{title} | unknown | unknown | unknown |" in text
    assert "Trained by" not in text
    assert "7.7" not in text
    assert "update 1" not in text


def test_what_was_trained_here_after_an_import_is_told_apart(run, tmp_path):
    base = imported(tmp_path / "new", checkpoint_of(run, "pretrain"), 1, "pretrain")
    shutil.copytree(run / "sft", tmp_path / "new/sft")
    edited(tmp_path / "new/sft/config.json", lambda found: found["resolved"].update(
        base=base.folder, base_sha256=base.weights_sha256
    ))  # fmt: skip
    text = page_of(tmp_path / "new", "sft").text
    assert "trained with nanochat on Ray: update 2 of fine-tuning." in text
    assert "stages | pretraining elsewhere (a foreign <model>), then fine-tuning |" in text
    assert "fine-tuning | 2 | 1,152 | 5.76e+06" in text
    assert "these together | | | unknown" in text
    assert "Trained by" in text


def test_a_damaged_file_is_named(run):
    (run / "sft/config.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"sft/config\.json"):
        page_of(run, "rl")


def names_of(run, checkpoint):
    return [(stage.name, stage.run.root, stage.step) for stage in lineage(str(run), checkpoint)]


def test_a_line_that_was_moved_is_followed_in_its_new_place(whole, run, tmp_path):
    expected = [("pretrain", 6), ("sft", 2), ("rl", 3)]
    assert names_of(whole, checkpoint_of(whole, "rl")) == [(name, str(whole), step) for name, step in expected]
    for stage in ("sft", "rl"):
        edited(run / stage / "config.json", lambda found: found["resolved"].update(
            base=found["resolved"]["base"].replace(str(run), "/no/longer/here")
        ))  # fmt: skip
    assert names_of(run, checkpoint_of(run, "rl")) == [(name, str(run), step) for name, step in expected]


def test_a_base_counts_only_with_the_weights_that_the_stage_began_from(run):
    edited(run / "sft/config.json", lambda found: found["resolved"].update(base_sha256="0" * 64))
    assert [stage.name for stage in lineage(str(run), checkpoint_of(run, "rl"))] == ["sft", "rl"]
    text = page_of(run, "rl").text
    assert "What fine-tuning began from is not in the run" in text
    assert "pretraining |" not in text.split("Time and cost")[0]


def test_a_base_in_another_run_brings_that_runs_data_and_account(run, tmp_path):
    base = checkpoint_of(run, "sft")
    rl = save(tmp_path / "later/rl/checkpoints", 1, base, {"base_sha256": base.weights_sha256})
    resolved = {"base": base.folder, "base_sha256": base.weights_sha256}
    storage.write_json(f"{tmp_path}/later/rl/config.json", {"resolved": resolved})
    text = Page(model_card(f"{tmp_path}/later", rl, stock=False)).text
    assert "pretraining, then fine-tuning, then reinforcement learning" in text
    assert "sayings" in text
    assert "2.50 dollars" in text, "its own practice made another model"
    assert "Scores Not measured." in text


@pytest.mark.parametrize("base", ["itself", "foo://x/sft/checkpoints/step_000002", "../sft/checkpoints/step_000009", 7])
def test_a_base_that_leads_nowhere_ends_the_line(run, base):
    rl = checkpoint_of(run, "rl")
    edited(run / "rl/config.json", lambda found: found["resolved"].update(
        base=rl.folder if base == "itself" else base, base_sha256=rl.weights_sha256
    ))  # fmt: skip
    assert [stage.name for stage in lineage(str(run), rl)] == ["rl"]


def test_without_all_of_its_parts_a_sum_is_unknown(run):
    path = run / "rl/metrics.jsonl"
    path.write_text(path.read_text().replace('"learner_positions": 1001.0', '"learner_positions": null'))
    text = page_of(run, "rl").text
    assert "reinforcement learning | 3 | unknown | unknown |" in text
    assert "these together | | | unknown" in text


def test_a_stage_without_its_config_has_unknown_sources(tmp_path):
    for name in ("pretrain", "sft", "rl"):
        (source,) = sources(TrainedStage(name, RunFolder(str(tmp_path)), 4))
        assert source["name"] is source["licence"] is source["passes"] is None
