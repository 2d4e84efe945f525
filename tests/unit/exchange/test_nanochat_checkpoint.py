"""A checkpoint in nanochat's layout loads into our model and computes what the tensors say."""

import copy
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from nanochat_files import SIZES, TODAY, config_of, randomised, state_dict, write_checkpoint
from safetensors.torch import load_file

from nanochat.config.model import ModelConfig
from nanochat.errors import CheckpointError
from nanochat.exchange.nanochat_checkpoint import load_nanochat_checkpoint
from nanochat.model.gpt import GPT
from nanochat.training.checkpoint import load_parameters

DATA = os.environ.get("NANOCHAT_TEST_DATA")
BOTH = pytest.mark.parametrize("sizes", [SIZES, TODAY], ids=["2025-10", "today"])


def tokens(vocab_size: int = 300, length: int = 300) -> torch.Tensor:
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: GPT, tokens_BT: torch.Tensor) -> torch.Tensor:
    return model.logits(model(tokens_BT))


def loaded(files: tuple[str, str]) -> GPT:
    config, tensors = load_nanochat_checkpoint(*files)
    model = GPT(config)
    load_parameters(model, tensors, "test")
    return model


def naive_logits(state: dict[str, torch.Tensor], sizes: dict, token_ids: list[int]) -> torch.Tensor:
    """What nanochat computed in 2025-10, one position at a time in float64: no code of the library, no parts but these.

    A rotary pair (i, i + D/2) is a complex number, turned by minus the position's angle.
    """
    state = {name.removeprefix("_orig_mod."): value.double() for name, value in state.items()}
    heads, groups = sizes["n_head"], sizes["n_kv_head"]
    width = sizes["n_embd"] // heads

    def normalised(x):
        return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()

    def turned(x, position):
        angles = torch.tensor([position * 10_000 ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
        pairs = torch.complex(x[:, : width // 2], x[:, width // 2 :]) * torch.polar(torch.ones_like(angles), -angles)
        return normalised(torch.cat([pairs.real, pairs.imag], dim=1))

    stream = [normalised(state["transformer.wte.weight"][token]) for token in token_ids]
    for layer in range(sizes["n_layer"]):
        p = {name: state[f"transformer.h.{layer}.{name}.weight"] for name in
             ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}  # fmt: skip
        keys, values = [], []
        for t, x in enumerate(stream):
            n = normalised(x)
            keys.append(turned((p["attn.c_k"] @ n).view(groups, width), t))
            values.append((p["attn.c_v"] @ n).view(groups, width))
            q = turned((p["attn.c_q"] @ n).view(heads, width), t)
            seen_k, seen_v = torch.stack(keys), torch.stack(values)
            mixed = []
            for h in range(heads):
                group = h * groups // heads
                weights = (seen_k[:, group] @ q[h] / math.sqrt(width)).softmax(0)
                mixed.append(weights @ seen_v[:, group])
            x = x + p["attn.c_proj"] @ torch.cat(mixed)
            stream[t] = x + p["mlp.c_proj"] @ (p["mlp.c_fc"] @ normalised(x)).clamp(min=0).square()
    raw = torch.stack([state["lm_head.weight"] @ normalised(x) for x in stream])[:, : sizes["vocab_size"]]
    return 15 * torch.tanh(raw / 15)


@pytest.mark.parametrize("padded", [True, False])
def test_a_model_of_2025_10_computes_what_nanochat_computed_then(tmp_path, padded):
    state = state_dict(randomised(config_of(SIZES)))
    if not padded:
        state = {name: value[:300] if "wte" in name or "lm_head" in name else value for name, value in state.items()}
    model = loaded(write_checkpoint(tmp_path, state, SIZES))
    expected = naive_logits(state, SIZES, tokens(length=40)[0].tolist())
    assert expected.std() > 2
    assert (logits(model, tokens(length=40))[0].double() - expected).abs().max() < 1e-4


@BOTH
def test_loads_and_agrees(tmp_path, sizes):
    source = randomised(config_of(sizes))
    model = loaded(write_checkpoint(tmp_path, state_dict(source), sizes))
    assert model.config == config_of(sizes)
    assert model.config.padded_vocab_size == 320
    torch.testing.assert_close(logits(model, tokens()), logits(source, tokens()), rtol=0, atol=0)
    for name, value in model.named_parameters():
        expected = source.state_dict()[name]
        assert torch.equal(
            value[:300] if len(value) == 320 else value, expected[:300] if len(value) == 320 else expected
        )
        assert not (len(value) == 320 and value[300:].any()), f"{name} has padding"


def test_the_sizes_and_parts_of_2025_10_are_those_of_the_stock_model_with_torchs_epsilon(tmp_path):
    config, _ = load_nanochat_checkpoint(*write_checkpoint(tmp_path, state_dict(randomised(config_of(SIZES))), SIZES))
    assert config == ModelConfig(
        **SIZES, window_pattern="L", value_embeddings=False, residual_scalars=False, backout=False, smear=False,
        rope_theta=10_000.0, qk_gain=1.0, norm_eps=None, logit_softcap=15.0,
    )  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_smear_that_does_nothing_is_left_out(tmp_path, prefix):
    source = randomised(config_of(TODAY))
    with torch.no_grad():
        source.smear_lambda.zero_()
    state = {name.replace("_orig_mod.", prefix): value for name, value in state_dict(source).items()}
    model = loaded(write_checkpoint(tmp_path, state, TODAY))
    assert model.config == ModelConfig(**TODAY)
    torch.testing.assert_close(logits(model, tokens()), logits(source, tokens()))


@pytest.mark.skipif(not DATA, reason="NANOCHAT_TEST_DATA is not set")
@pytest.mark.parametrize("letter", ["a", "b"])
def test_nanochats_own_model_gives_its_own_logits(tmp_path, letter):
    folder = Path(str(DATA)) / "reference"
    sizes = json.loads((folder / f"config_{letter}.json").read_text())["model"]
    model = loaded(write_checkpoint(tmp_path, load_file(folder / f"model_{letter}.safetensors"), sizes))
    assert model.config.smear is (letter == "b")
    with np.load(folder / f"forward_{letter}.npz") as expected:
        found = logits(model, torch.from_numpy(expected["tokens_BT"]))[:, expected["logits_positions"]].numpy()
        assert np.abs(found - expected["logits_BTV"]).max() < 1e-4


def dropped(name: str):
    return lambda state: state.pop(f"_orig_mod.{name}")


def put(name: str, *shape: int):
    return lambda state: state.update({f"_orig_mod.{name}": torch.ones(shape)})


GATE = "transformer.h.0.attn.ve_gate.weight"


@pytest.mark.parametrize(
    ("sizes", "change", "why"),
    [
        (TODAY, dropped("backout_lambda"), "lacks the tensor backout_lambda. It is not as nanochat of today has it"),
        (TODAY, dropped("resid_lambdas"), "lacks the tensor resid_lambdas."),
        (TODAY, dropped("x0_lambdas"), "lacks the tensor x0_lambdas."),
        (TODAY, dropped("smear_lambda"), "lacks the tensor smear_lambda."),
        (TODAY, dropped("smear_gate.weight"), "lacks the tensor smear_gate.weight."),
        (TODAY, dropped(GATE), f"lacks the tensor {GATE}."),
        (TODAY, dropped("value_embeds.2.weight"), "lacks the tensor value_embeds.2.weight."),
        (TODAY, dropped("lm_head.weight"), "lacks the tensor lm_head.weight."),
        (TODAY, put(GATE, 2, 32), f"{GATE} is of shape (2, 32), must be (2, 12)."),
        (TODAY, put("value_embeds.1.weight", 320, 24), "has a tensor value_embeds.1.weight."),
        (TODAY, put("transformer.h.1.attn.ve_gate.weight", 2, 12), "has a tensor transformer.h.1.attn.ve_gate.weight."),
        (TODAY, put("smear_gate.weight", 1, 12), "smear_gate.weight is of shape (1, 12), must be (1, 24)."),
        (TODAY, put("value_embeds.0.weight", 300, 12), "is of shape (300, 12), must be (320, 24)."),
        (TODAY, put("value_embeds.0.weight", 310, 24), "is of shape (310, 24), must be (320, 24)."),
        (TODAY, put("bigram_lambdas", 5), "has a tensor bigram_lambdas."),
        (SIZES, dropped("transformer.h.0.mlp.c_fc.weight"), "lacks the tensor transformer.h.0.mlp.c_fc.weight."),
        (SIZES, put("transformer.h.0.mlp.c_fc.weight", 300, 48), "is of shape (300, 48), must be (192, 48)."),
        (SIZES, put("transformer.wte.weight", 384, 48), "wte.weight is of shape (384, 48), must be (320, 48)."),
        (SIZES, put("lm_head.weight", 299, 48), "lm_head.weight is of shape (299, 48), must be (320, 48)."),
        (SIZES, put("transformer.h.0.attn.c_q.bias", 48), "has a tensor transformer.h.0.attn.c_q.bias. It is not as "
         "nanochat of 2025-10 has it; how others compute, a file does not tell."),
        (SIZES, put("resid_lambdas", 5), "lacks model_config.window_pattern, which the nanochat that has these"),
        (SIZES, put("value_embeds.0.weight", 320, 24), "lacks model_config.window_pattern"),
        (SIZES, put(GATE, 2, 12), "lacks model_config.window_pattern"),
        (SIZES, put("transformer.h.5.mlp.c_fc.weight", 192, 48), "n_layer=5: "),
    ],
)  # fmt: skip
def test_a_version_that_is_neither_is_refused_by_its_tensor(tmp_path, sizes, change, why):
    state = state_dict(randomised(config_of(sizes)))
    change(state)
    with pytest.raises(CheckpointError) as raised:
        load_nanochat_checkpoint(*write_checkpoint(tmp_path, state, sizes))
    assert why in str(raised.value)


def test_parts_of_2025_10_under_a_window_pattern_are_refused(tmp_path):
    """So it was in between: windows, but nothing else that shows in names."""
    state = state_dict(randomised(config_of(SIZES)))
    with pytest.raises(CheckpointError, match="lacks the tensor backout_lambda"):
        load_nanochat_checkpoint(*write_checkpoint(tmp_path, state, TODAY))


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ([1, 2], "holds no state dict"),
        ({"transformer.wte.weight": 3}, "holds no state dict"),
        ({1: torch.ones(2)}, "holds no state dict"),
        ({"lm_head.weight": torch.ones(2).int()}, "lm_head.weight is torch.int32, no plain tensor of floats"),
        ({"lm_head.weight": torch.ones(2).double()}, "lm_head.weight is torch.float64, no plain tensor of floats"),
        (
            {"lm_head.weight": torch.ones(2, 2).to_sparse()},
            r"cannot be read \(it names torch\._utils _rebuild_sparse_tensor\)",
        ),
        (
            {"lm_head.weight": torch.ones(2, device="meta")},
            r"cannot be read \(it names torch\._utils _rebuild_meta_tensor",
        ),
        ({"lm_head.weight": torch.ones(1).expand(1 << 40, 8)}, "its tensors are larger than the file"),
        ({f"a{n}": torch.ones(4096)[:] for n in range(1)} | dict.fromkeys("bcd", torch.ones(4096)), "larger than the"),
    ],
)
def test_refuses_what_is_no_state_dict(tmp_path, state, why):
    with pytest.raises(CheckpointError, match=why):
        load_nanochat_checkpoint(*write_checkpoint(tmp_path, state, SIZES))


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    witness = tmp_path / "witness"
    files = write_checkpoint(tmp_path, {"lm_head.weight": Runs(witness)}, SIZES)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_nanochat_checkpoint(*files)
    assert not witness.exists()
    torch.load(files[0], weights_only=False)
    assert witness.exists(), "the file was dangerous"


class Huge:
    def __reduce__(self):
        return bytearray, (1 << 62,)


def test_a_number_makes_no_memory(tmp_path, monkeypatch):
    """weights_only admits bytearray: of so many bytes it is a MemoryError, of a few less the end of the machine."""
    files = write_checkpoint(tmp_path, {"lm_head.weight": Huge()}, SIZES)
    with pytest.raises(MemoryError):
        torch.load(files[0], weights_only=True)
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("it is loaded"))
    with pytest.raises(CheckpointError, match=r"cannot be read \(it names __builtin__ bytearray\)"):
        load_nanochat_checkpoint(*files)


def archived(path: Path, change) -> None:
    """Write a torch file anew, its entries changed by `change(archive, entries)`."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        change(archive, entries)


def lie_in_one_place(archive, entries):
    for name, content in entries:
        if "/data/" not in name or name.endswith("/data/0"):
            archive.writestr(name, content)
    (first,) = [entry for entry in archive.filelist if entry.filename.endswith("/data/0")]
    for number in range(1, 50):
        again = copy.copy(first)
        again.filename = again.orig_filename = f"{first.filename[:-1]}{number}"
        archive.filelist.append(again)


def are_packed(archive, entries):
    for name, content in entries:
        archive.writestr(name, content, zipfile.ZIP_DEFLATED if "/data/" in name else zipfile.ZIP_STORED)


@pytest.mark.parametrize("change", [lie_in_one_place, are_packed])
def test_parts_that_take_more_than_the_file_are_refused_before_they_are_read(tmp_path, monkeypatch, change):
    state = {f"a{number}": torch.full((4096,), float(number)) for number in range(50)}
    files = write_checkpoint(tmp_path, state, SIZES)
    archived(Path(files[0]), change)
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("it is loaded"))
    with pytest.raises(CheckpointError, match=r"cannot be read \(it is packed, or its parts overlap\)"):
        load_nanochat_checkpoint(*files)


def named_in_another_case(path: Path) -> None:
    """torch finds its parts without regard to case."""

    def change(archive, entries):
        for name, content in entries:
            archive.writestr(name.replace("data.pkl", "data.PKL"), content)

    archived(path, change)


def before_a_harmless_one(path: Path) -> None:
    """Two archives of one length: Python takes the directory at the end, torch the one at the place that it names."""

    def change(archive, entries):
        for name, content in entries:
            archive.writestr(name, b"\x80\x02}.".ljust(len(content)) if name.endswith("data.pkl") else content)

    archived(path, lambda archive, entries: [archive.writestr(*entry) for entry in entries])
    harmful = path.read_bytes()
    archived(path, change)
    path.write_bytes(harmful + path.read_bytes())


@pytest.mark.parametrize("hide", [named_in_another_case, before_a_harmless_one])
def test_what_torch_reads_is_what_is_checked(tmp_path, monkeypatch, hide):
    files = write_checkpoint(tmp_path, {"lm_head.weight": Huge()}, SIZES)
    hide(Path(files[0]))
    with pytest.raises(MemoryError):
        torch.load(files[0], weights_only=True)
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("it is loaded"))
    with pytest.raises(CheckpointError, match=r"cannot be read \(it names __builtin__ bytearray\)"):
        load_nanochat_checkpoint(*files)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no model", b"\x80\x04."])
def test_a_damaged_file_is_refused(tmp_path, content):
    files = write_checkpoint(tmp_path, {}, SIZES)
    Path(files[0]).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_nanochat_checkpoint(*files)
    Path(files[0]).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_nanochat_checkpoint(*files)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    state = state_dict(randomised(config_of(SIZES)))
    state["_orig_mod.transformer.h.3.attn.c_k.weight"][1, 2] = value
    with pytest.raises(CheckpointError, match=r"transformer\.h\.3\.attn\.c_k\.weight is not finite"):
        load_nanochat_checkpoint(*write_checkpoint(tmp_path, state, SIZES))


@pytest.mark.parametrize("size", [0, -1, 1 << 25, 3.0, "3", None, True])
@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_none_is_refused(tmp_path, name, size):
    files = write_checkpoint(tmp_path, {}, SIZES | {name: size})
    with pytest.raises(CheckpointError, match=f"model_config.{name}={size}, which is no size"):
        load_nanochat_checkpoint(*files)


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({}, "lacks model_config.sequence_len"),
        (None, "lacks model_config.sequence_len"),
        ({name: 3 for name in SIZES if name != "n_kv_head"}, "lacks model_config.n_kv_head"),
        (TODAY | {"window_pattern": 3}, "window_pattern=3, which is no pattern"),
        (TODAY | {"window_pattern": "L" * 300}, "which is no pattern"),
        (SIZES | {"frozen_embd": True}, "has model_config.frozen_embd, which karpathy/nanochat has not"),
    ],
)
def test_meta_without_what_is_needed_is_refused(tmp_path, sizes, why):
    with pytest.raises(CheckpointError, match=why):
        load_nanochat_checkpoint(*write_checkpoint(tmp_path, {}, sizes))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"n_layer": 4}, r"n_layer=4: .*model_000650\.pt has 5 layers"),
        ({"n_layer": 1 << 24}, "has 5 layers"),
        ({"n_head": 5}, r"^meta=.*meta_000650\.json: n_head=5: n_embd / n_head must be even"),
        ({"n_embd": 1 << 24}, r"is of shape \(320, 48\), must be"),
        ({"vocab_size": 1 << 24}, r"is of shape \(320, 48\), must be"),
        ({"n_kv_head": 4}, "attn.c_k.weight is of shape"),
        ({"window_pattern": "XL"}, "window_pattern='XL': only the letters"),
        ({"window_pattern": ""}, "only the letters"),
    ],
)
def test_sizes_that_do_not_fit_the_tensors_are_refused(tmp_path, changed, why):
    state = state_dict(randomised(config_of(TODAY)))
    with pytest.raises(CheckpointError, match=why):
        load_nanochat_checkpoint(*write_checkpoint(tmp_path, state, TODAY | changed))


@pytest.mark.parametrize("content", ["", "[1, 2]", "3", "[" * 100_000, '{"model_config": 3}'])
def test_a_damaged_meta_is_refused(tmp_path, content):
    files = write_checkpoint(tmp_path, {}, SIZES)
    Path(files[1]).write_text(content)
    with pytest.raises(CheckpointError, match=r"meta=.*meta_000650\.json: "):
        load_nanochat_checkpoint(*files)


def test_a_meta_that_is_missing_or_huge_is_refused(tmp_path):
    files = write_checkpoint(tmp_path, {}, SIZES)
    Path(files[1]).write_text(json.dumps({"model_config": SIZES}) + " " * (1 << 20))
    with pytest.raises(CheckpointError, match="is no meta_"):
        load_nanochat_checkpoint(*files)
    Path(files[1]).unlink()
    with pytest.raises(CheckpointError, match="is no meta_"):
        load_nanochat_checkpoint(*files)
