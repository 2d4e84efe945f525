import dataclasses
import html
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import CONFIG, HOSTILE, STEP

import nanochat
from nanochat import storage
from nanochat.data.conversations import supervised
from nanochat.data.packing import Packer
from nanochat.data.row_order import RowOrder
from nanochat.evaluation.bits_per_byte import bits_per_byte, count_nats_and_bytes
from nanochat.model.gpt import GPT
from nanochat.pages import walk_pretrain
from nanochat.pages.page import environment, source_of
from nanochat.pages.walk import SECTIONS, write_walk
from nanochat.pages.walk_artifacts import Section, Walk, piece_lengths, shown_tokens


@pytest.fixture(scope="module")
def walk(tiny_run):
    return Walk(tiny_run)


@pytest.fixture(scope="module")
def page(tiny_run, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("walk") / "tiny"
    shutil.copytree(tiny_run, run_dir)
    return Path(write_walk(str(run_dir))).read_text()


def test_the_conversations_mask_is_what_is_trained_on(walk):
    (section,) = (section for section in SECTIONS if section.name == "conversation")
    values = section.values(walk)
    ids = np.array([token["id"] for token in values["tokens"]])
    says = [token["says"] for token in values["tokens"]]
    assert says == supervised(walk.tokenizer, ids).tolist()
    assert 0 < sum(says) == values["supervised"] < len(says) == values["count"]


def test_the_newest_rollouts_of_one_group_are_compared(walk, page):
    (section,) = (section for section in SECTIONS if section.name == "rollouts")
    values = section.values(walk)
    assert values["step"] == 1, "the later note has replies to two questions"
    assert [one["group"] for one in values["replies"]] == [7, 7]
    text = " ".join(html.unescape(re.sub(r"</?(?:p|b|small)\b[^>]*>", "", page)).split())
    assert "it replies 4 times to a question" in text
    assert "later yes best: reward 1.0; its advantage is above 0, so that what the model said in it becomes li" in text
    worst = "worst: reward 0.125, cut off at 37 tokens; its advantage is below 0, so that what the model said"
    assert f"{' '.join(HOSTILE.split())} {worst} in it becomes less likely" in text
    assert "The advantage is the reward minus the mean of its group." in text


def test_a_run_without_reinforcement_learning_has_no_section_on_it(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("rl"))
    page = Path(write_walk(str(tmp_path / "run"))).read_text()
    assert re.findall(r'<section id="(\w+)">', page) == [one.name for one in SECTIONS if one.name != "rollouts"]
    assert "Replies and their rewards" not in page


@pytest.mark.parametrize("note", [{"step": 4}, {"samples": [{}, {}]}, {"samples": [5, 6]}, {"samples": []}])
def test_rollouts_in_another_form_are_named(tiny_run, tmp_path, note):
    shutil.copytree(tiny_run, tmp_path / "run")
    storage.append_jsonl(str(tmp_path / "run/rl/samples.jsonl"), note)
    sections = [section for section in SECTIONS if section.name == "rollouts"]
    page = Path(write_walk(str(tmp_path / "run"), sections)).read_text()
    assert "rl/samples.jsonl: has other fields" in page


@pytest.fixture(scope="module")
def row_1T(walk):
    shard = walk.shards.split("validation")[0]
    return torch.from_numpy(walk.shards.read_rows(shard, 0)[:1].astype(np.int64))


def test_the_validation_splits_first_row_is_followed(walk, row_1T):
    assert walk.row == row_1T[0].tolist()
    assert walk.document == walk.row  # a long document fills its first row
    assert walk_pretrain.text_values(walk)["text"].startswith(HOSTILE)


def test_every_section_has_its_values_in_the_page(page):
    assert re.findall(r'<section id="(\w+)">', page) == [section.name for section in SECTIONS]
    assert "Not here yet" not in page


def test_text_of_the_corpus_stays_text(page):
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.feed(page)
    assert "alert(1)" in page
    assert not {"script", "img"} & {tag for tag, _ in tags}
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)


def test_tokens_and_their_ids(walk, page):
    tokens = walk_pretrain.token_values(walk)["tokens"]
    assert [token["id"] for token in tokens] == walk.row[: walk_pretrain.SHOWN_TOKENS]
    assert all(f"<small>{token['id']}</small>" in page for token in tokens)
    assert tokens[0]["special"]
    assert tokens[0]["text"] == "<|bos|>"


def test_a_split_word_and_its_letters(walk):
    values = walk_pretrain.token_values(walk)
    assert len(values["word"]) > 5
    assert values["letters"] == values["word"].count(values["letter"]) > 0
    ids = [[token["id"] for token in spelling] for spelling in values["spellings"]]
    assert ids[1] == walk.tokenizer.encode_ordinary(" " + values["word"])
    assert len(ids[1]) > 1
    assert ids[0] != ids[1]


def test_half_a_character_shows_its_bytes(walk):
    assert shown_tokens(walk.tokenizer, [0xE2])[0]["text"] == "\\xe2"


def test_a_shared_row_is_found_and_taken_apart(walk):
    values = walk_pretrain.row_values(walk)
    rows = list(walk.validation_rows())
    number = values["shared"]["number"]
    assert all(row.count(walk.tokenizer.bos) == 1 for row in rows[:number])
    pieces = values["shared"]["pieces"]
    assert sum(piece["length"] for piece in pieces) == len(walk.row)
    assert len([piece for piece in pieces if not piece["padding"]]) > 1
    assert pieces[1]["text"].startswith("A short document, number")
    assert [(a["id"], b["id"]) for a, b in values["pairs"]] == list(zip(walk.row[:8], walk.row[1:9]))


def test_pieces_of_a_row():
    assert piece_lengths([9, 1, 2, 9, 3, 9, 9], bos=9) == [3, 2, 1, 1]


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_weights_are_the_models(walk, row_1T, layer):
    """The layer's real output at the query is its weights times its real values."""
    _, model = walk.models
    tokens_1T = row_1T[:, :180]
    block_attention = model.blocks[layer].attn
    seen = {}
    hooks = [
        block_attention.register_forward_pre_hook(lambda module, inputs: seen.update(inputs=inputs)),
        block_attention.c_v.register_forward_hook(lambda module, inputs, output: seen.update(v=output)),
        block_attention.c_proj.register_forward_pre_hook(lambda module, inputs: seen.update(y=inputs[0])),
    ]
    with torch.no_grad():
        model(tokens_1T)
        for hook in hooks:
            hook.remove()
        v_TD = seen["v"][0]
        if block_attention.ve_gate is not None:
            x_TC, embedding_TD = seen["inputs"][0][0], seen["inputs"][1][0]
            v_TD = v_TD + 3 * torch.sigmoid(block_attention.ve_gate(x_TC[:, :12])) * embedding_TD
    weights_HT = walk_pretrain.attention_weights(model, tokens_1T, layer)
    assert weights_HT.shape == (2, 180)
    torch.testing.assert_close(weights_HT.sum(dim=1), torch.ones(2))
    torch.testing.assert_close((weights_HT @ v_TD).flatten(), seen["y"][0, -1])
    window = model.config.windows[layer]
    assert bool((weights_HT[:, : 180 - 1 - window] == 0).all()) if window < 179 else bool((weights_HT > 0).all())


def test_two_windows_are_shown_and_their_weights_sum_to_1(walk, page):
    values = walk_pretrain.attention_values(walk)
    assert [layer["window"] for layer in values["layers"]] == [128, 192]
    assert values["query"] == 160  # behind the short window's edge
    short, full = values["layers"]
    assert short["sum"] == pytest.approx(1, abs=1e-5)
    assert sum(weight == 0 for weight in short["heads"][0]) == 160 - 128
    assert min(full["heads"][0]) > 0
    assert "reaches 128 tokens back. The shares of this head sum to 1.0000" in page


def test_losses_are_those_of_the_models_before_and_after(walk, row_1T, page):
    fresh = GPT(walk.models[1].config)
    fresh.initialize(torch.Generator().manual_seed(CONFIG.seed))
    values = walk_pretrain.loss_values(walk)
    token_bytes = torch.from_numpy(walk.tokenizer.token_bytes())
    for model, shown in zip((fresh, walk.models[1]), values["models"], strict=True):
        losses_T = model.token_losses(row_1T[:, :-1], row_1T[:, 1:])[0]
        assert [token["nats"] for token in shown["tokens"]] == losses_T.tolist()
        assert [token["id"] for token in shown["tokens"]] == walk.row[1:]
        assert shown["mean"] == pytest.approx(float(losses_T.mean()))
        bpb = bits_per_byte(*count_nats_and_bytes(model, [row_1T.numpy()], token_bytes).tolist())
        assert shown["bpb"] == pytest.approx(bpb)
        assert f"{shown['name']}: {float(losses_T.mean()):.3f} nats per token, {bpb:.3f} bits per byte" in page
        assert f'title="{float(losses_T[5]):.2f} nats"' in page
    assert values["blind"] == pytest.approx(math.log(walk.tokenizer.vocab_size))
    assert values["models"][0]["mean"] == pytest.approx(values["blind"], abs=0.1)


def test_losses_of_a_run_that_masks_documents_are_masked(tiny_run):
    walk = Walk(tiny_run)
    walk.row = next(row for row in walk.validation_rows() if row.count(walk.tokenizer.bos) > 1)
    _, unmasked_T = walk.losses
    masking = Walk(tiny_run)
    masking.row, masking.config = walk.row, dataclasses.replace(CONFIG, document_masking=True)
    token_bytes = torch.from_numpy(walk.tokenizer.token_bytes())
    nats = (masking.losses[1] * (token_bytes[walk.row[1:]] > 0)).sum()
    rows = [np.array([walk.row])]
    expected = count_nats_and_bytes(masking.models[1], rows, token_bytes, walk.tokenizer.bos)[0]
    assert float(nats) == pytest.approx(float(expected), rel=1e-5)
    first = walk.row.index(walk.tokenizer.bos, 1)
    torch.testing.assert_close(masking.losses[1][: first - 1], unmasked_T[: first - 1])
    assert float((masking.losses[1] - unmasked_T)[first + 1 :].abs().max()) > 1e-2


def test_what_is_held_out_is_said_as_it_is(walk, page, tiny_run):
    assert walk_pretrain.text_values(walk)["by_hash"] is False
    assert "stands in <code>held_out.parquet</code>, which is held out" in page
    other = Walk(tiny_run)
    shards = [dataclasses.replace(shard, skipped={"other_split": 3}) for shard in walk.shards.shards]
    other.shards = dataclasses.replace(walk.shards, shards=tuple(shards))
    values = walk_pretrain.text_values(other)
    assert values["by_hash"] is True
    text = environment().get_template("walk_sections.html").module.text(values)
    assert "held_out.parquet</code>, whose documents are divided by a hash of their text; this one is held out" in text


def test_predictions_are_the_models_probabilities(walk, row_1T):
    places = walk_pretrain.prediction_values(walk)["places"]
    assert len(places) == 3
    truths = [place["columns"][1]["truth"] for place in places]
    assert truths == sorted(truths, reverse=True), "from a place where the model does well to one where it does badly"
    _, losses_T = walk.losses
    for place in places:
        position = int((losses_T + math.log(place["columns"][1]["truth"])).abs().argmin())
        assert place["truth"]["id"] == walk.row[position + 1]
        with torch.no_grad():
            probabilities_V = walk.models[1].logits(walk.models[1](row_1T[:, : position + 1]))[0, -1].softmax(dim=-1)
        bars = place["columns"][1]["bars"]
        assert [bar["id"] for bar in bars] == probabilities_V.topk(5).indices.tolist()
        assert [bar["share"] for bar in bars] == pytest.approx(probabilities_V.topk(5).values.tolist(), rel=1e-4)


def test_updates_tell_the_first_rows_and_the_passes(walk, page):
    values = walk_pretrain.update_values(walk)
    order = RowOrder(walk.shards.groups("train"), CONFIG.seed)
    assert values["first_rows"] == order.locate(0, 2).tolist()
    assert values["epochs"] == pytest.approx(STEP * 2 / order.rows_per_epoch)
    assert values["seen"][0] <= values["epochs"] <= values["seen"][1]
    assert "takes the rows " + ", ".join(map(str, values["first_rows"])) in page


def test_code_is_named_by_file_and_line(page):
    place = source_of(Packer)
    path, line = place.split(":")
    source = (Path(nanochat.__file__).parent.parent / path).read_text().splitlines()
    assert source[int(line) - 1] == "class Packer:"
    assert f"<code>{place}</code> Packer" in page


@pytest.mark.parametrize(
    ("missing", "sections"),
    [
        ("pretrain/checkpoints", {"attention", "loss", "predictions", "updates"}),
        ("pretrain/config.json", {"attention", "loss", "predictions", "updates"}),
        ("shards/manifest.json", {section.name for section in SECTIONS} - {"conversation", "rollouts"}),
        ("sft/config.json", {"conversation"}),
        ("rl/samples.jsonl", {"rollouts"}),
        ("tokenizer", {section.name for section in SECTIONS} - {"rollouts"}),
    ],
)
def test_a_missing_part_is_named_and_the_rest_is_there(tiny_run, tmp_path, missing, sections):
    shutil.copytree(tiny_run, tmp_path / "run")
    storage.remove(str(tmp_path / "run" / missing))
    page = Path(write_walk(str(tmp_path / "run"))).read_text()
    parts = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, flags=re.DOTALL))
    assert {name for name, part in parts.items() if "Not here yet" in part} == sections


@pytest.mark.parametrize("words", [1, 5])
def test_a_row_that_is_mostly_padding(tiny_run, words):
    walk = Walk(tiny_run)
    bos = walk.tokenizer.bos
    walk.row = [bos, *range(65, 65 + words), *[bos] * (192 - words)]
    values = {section.name: section.values(walk) for section in SECTIONS}
    assert walk.document == [bos, *range(65, 65 + words)]
    assert values["attention"]["query"] == words
    nats = float(walk.losses[1][:words].sum())
    assert values["loss"]["models"][1]["bpb"] == pytest.approx(nats / math.log(2) / words), (
        "padding stands for no bytes"
    )


def test_a_later_stage_adds_a_section(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    text = next(section for section in SECTIONS if section.name == "text")
    added = dataclasses.replace(text, title="One more <stop>")
    assert isinstance(added, Section)
    page = Path(write_walk(str(tmp_path / "run"), (text, added))).read_text()
    assert "2. One more &lt;stop&gt;" in page
