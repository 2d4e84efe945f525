"""Exported folders load in transformers and come back bit for bit; what does not fit is refused by name."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from naive_gpt import randomise
from safetensors.torch import load_file, save_file

from nanochat.config.model import ModelConfig, stock
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.errors import CheckpointError, ConfigError, NanochatError
from nanochat.exchange.hf_folder import read_folder, write_folder
from nanochat.exchange.modeling_nanochat import NanochatOnRayConfig
from nanochat.model.gpt import GPT

MERGES = [b"th", b"the", b" t", b" the", b"in", b"er", b"an", b"on"]
TOKENIZER = Tokenizer(MERGES, SPLIT_PATTERNS["nanochat"])
SIZES = {
    "sequence_len": 512, "vocab_size": TOKENIZER.vocab_size, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 64,
}  # fmt: skip
FULL = ModelConfig(**SIZES, window_pattern="SSL")
MODELS = {
    "full": FULL, "stock": stock(FULL), "no values": ModelConfig(**SIZES, value_embeddings=False, backout=False),
    "no scalars": ModelConfig(**(SIZES | {"n_layer": 3}), residual_scalars=False, norm_eps=1e-5),
}  # fmt: skip
SAMPLING = {"temperature": 0.8, "top_k": 40}


def random_model(config: ModelConfig) -> GPT:
    model = GPT(config).eval()
    randomise(model)
    with torch.no_grad():
        for value in model.parameters():
            if value.shape[0] == config.padded_vocab_size:
                value[config.vocab_size :] = 0
    return model


@pytest.fixture(autouse=True)
def own_module_cache(tmp_path_factory, monkeypatch):
    """Code of folders is copied into a cache before it is imported."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


def export(folder: Path, config: ModelConfig, *, is_chat: bool = True, **options) -> GPT:
    model = random_model(config)
    write_folder(
        str(folder), config, model.state_dict(), TOKENIZER, is_chat=is_chat, generation=SAMPLING, **options
    )  # fmt: skip
    return model


def theirs(folder: Path, config: ModelConfig, **options) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    is_own = config not in (MODELS["stock"],)
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=is_own, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    return model.eval()


def our_logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(tokens))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_and_unmodified_for_stock(name, tmp_path):
    config = MODELS[name]
    model = export(tmp_path, config)
    content = json.loads((tmp_path / "config.json").read_text())
    assert ("auto_map" in content) == (name != "stock")
    assert (tmp_path / "modeling_nanochat.py").exists() == (name != "stock")
    other = theirs(tmp_path, config)
    assert type(other).__name__ == ("NanoChatForCausalLM" if name == "stock" else "NanochatOnRayForCausalLM")
    tokens = torch.randint(config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual = other(tokens).logits
    assert actual.std() > 1
    torch.testing.assert_close(actual, our_logits(model, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["full", "stock"])
def test_transformers_generates_what_we_would_with_its_cache_and_with_padding(name, tmp_path):
    config = MODELS[name]
    model, other = export(tmp_path, config), theirs(tmp_path, config)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(200, (length,), generator=draw).tolist() for length in (3, 140, 1, 60)]
    width = max(map(len, prompts))
    ids = torch.tensor([[TOKENIZER.bos] * (width - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    made = other.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for prompt, row in zip(prompts, made[:, width:].tolist(), strict=True):
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(our_logits(model, torch.tensor([tokens]))[0, -1].argmax()))
        assert row == tokens[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_comes_back_bit_for_bit(name, tmp_path):
    config = MODELS[name]
    model = export(tmp_path, config)
    back = read_folder(str(tmp_path))
    assert back.config == config
    assert back.tokenizer.hash == TOKENIZER.hash
    assert (back.is_chat, back.generation) == (True, SAMPLING)
    state = model.state_dict()
    assert set(back.tensors) == set(state)
    for key, tensor in state.items():
        assert back.tensors[key].dtype == torch.float32
        assert torch.equal(back.tensors[key], tensor), key


def test_nothing_of_the_padding_goes_out(tmp_path):
    export(tmp_path, FULL)
    assert FULL.padded_vocab_size > FULL.vocab_size
    sizes = {name: one.shape[0] for name, one in load_file(tmp_path / "model.safetensors").items()}
    assert FULL.padded_vocab_size not in sizes.values()
    assert [sizes[name] for name in ("transformer.wte.weight", "lm_head.weight", "value_embeds.1.weight")] == [
        FULL.vocab_size
    ] * 3


def test_bfloat16_is_rounded_once_and_read_as_it_is(tmp_path):
    model = export(tmp_path, FULL, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    back = read_folder(str(tmp_path)).tensors["lm_head.weight"]
    assert torch.equal(back, model.lm_head.weight.bfloat16().float())


def test_smear_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"smear=True: .*native backend"):
        export(tmp_path, ModelConfig(**SIZES, smear=True))
    assert list(tmp_path.iterdir()) == []


def test_a_base_model_has_no_chat_template(tmp_path):
    export(tmp_path, FULL, is_chat=False)
    assert not (tmp_path / "chat_template.jinja").exists()
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == TOKENIZER.bos
    assert read_folder(str(tmp_path)).is_chat is False


def test_transformers_chats_through_the_folders_own_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    export(tmp_path, FULL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the end"}], add_generation_prompt=True)[
        "input_ids"
    ]
    names = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>")
    start, user, end, answer = map(TOKENIZER.special, names)
    assert ids == [start, user, *TOKENIZER.encode_ordinary("the end"), end, answer]
    assert tokenizer.eos_token_id == TOKENIZER.special("<|assistant_end|>")


@pytest.mark.parametrize("name", ["full", "stock"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"lm_head.weight": None}, r"lacks the tensor lm_head\.weight"),
        ({"extra.weight": torch.zeros(2)}, r"has a tensor extra\.weight"),
        ({"lm_head.weight": torch.zeros(3, 64)}, r"lm_head\.weight is of shape \(3, 64\), must be \(273, 64\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, damage, message, tmp_path):
    export(tmp_path, MODELS[name])
    tensors = load_file(tmp_path / "model.safetensors") | damage
    save_file({key: one for key, one in tensors.items() if one is not None}, tmp_path / "model.safetensors")
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match=message):
        read_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("full", {"model_type": "llama"}, "model_type=llama, must be nanochat or nanochat_on_ray"),
        ("full", {"n_layer": "4"}, "n_layer='4', must be int"),
        ("full", {"n_head": 5}, "n_head=5: n_embd / n_head must be even"),
        ("full", {"windows": [512] * 4}, "windows="),
        ("full", {"vocab_size": 1 << 40}, "vocab_size="),
        ("full", {"smear": 1}, "smear=1, must be bool"),
        ("full", {"sequence_len": -1}, "sequence_len=-1, must be 1 to 1048576"),
        ("full", {"qk_gain": 0}, "qk_gain=0, must be above 0"),
        ("stock", {"num_hidden_layers": -1}, "num_hidden_layers=-1, must be 1 to 512"),
        ("stock", {"num_key_value_heads": 0}, "num_key_value_heads=0, must be 1 to 512"),
        ("stock", {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6', must be float"),
        ("full", {"rope_theta": 10**400}, "rope_theta=10*\\.*, must be at most 1e.12"),
        ("full", {"qk_gain": -1e300}, "qk_gain=-1e.300, must be at most 1000"),
        ("full", {"qk_gain": float("nan")}, "qk_gain=nan, must be at most 1000"),
        ("full", {"norm_eps": 10**400}, "norm_eps=10*\\.*, must be at most 1"),
        ("full", {"n_layer": 512, "window_pattern": "S" * (1 << 22)}, "window_pattern=S*.*, must be at most 256"),
        ("stock", {"hidden_act": "gelu"}, "hidden_act=gelu: must be relu2"),
        ("stock", {"attention_bias": True}, "attention_bias=True: must be False"),
        ("stock", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type=yarn"),
        ("stock", {"intermediate_size": 100}, "intermediate_size=100: must be 256"),
        ("stock", {"num_hidden_layers": None}, "num_hidden_layers=None, must be a number"),
        ("stock", {"rms_norm_eps": None}, "rms_norm_eps=None, must be a number"),
        ("stock", {"final_logit_softcapping": None}, "final_logit_softcapping=None, must be a number"),
        ("stock", {"rope_parameters": 7}, "rope_parameters=7, must be an object"),
        ("stock", {"rope_parameters": None, "rope_scaling": {"rope_type": "linear"}}, "rope_type=linear"),
        ("stock", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: there is no such thing"),
        ("stock", {"head_dim": 8}, "head_dim=8: must be 16"),
        ("stock", {"sliding_window": 8}, "sliding_window=8: there is no such thing"),
        ("stock", {"layer_types": ["sliding_attention"]}, "layer_types=.*: must be full_attention"),
        ("stock", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_type=linear"),
        ("stock", {"rope_parameters": []}, r"rope_parameters=\[\], must be an object"),
        ("stock", {"rms_norm_eps": -1.0}, r"norm_eps=-1\.0, must be above 0"),
        ("full", {"logit_softcap": 0.0}, r"logit_softcap=0\.0, must be above 0"),
        ("stock", {"quantization_config": {"bits": 8}}, "quantization_config=.*: there is no such thing"),
        ("stock", {"vocab_size": 200}, "is of shape"),
    ],
)  # fmt: skip
def test_a_config_that_says_something_else_is_refused(name, change, message, tmp_path):
    export(tmp_path, MODELS[name])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(NanochatError, match=message):
        read_folder(str(tmp_path))


def test_a_config_that_leaves_windows_out_has_the_same_in_both():
    for given in (SIZES, SIZES | {"window_pattern": "SSL"}, SIZES | {"sequence_len": 4096, "window_pattern": "L"}):
        assert NanochatOnRayConfig(**given).windows == ModelConfig(**given).windows


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ({"do_sample": False, "temperature": 0.9, "top_k": 200}, {"temperature": 0.0, "top_k": 200}),
        ({"do_sample": True, "temperature": 0.9}, {"temperature": 0.9}),
        ({"do_sample": False}, {"temperature": 0.0}), ({}, {}),
    ],
)  # fmt: skip
def test_how_to_sample_is_read_as_transformers_means_it(said, read, tmp_path):
    export(tmp_path, MODELS["stock"])
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert read_folder(str(tmp_path)).generation == read


@pytest.mark.parametrize("generation", [{}, {"temperature": 0.0}, SAMPLING])
def test_how_to_sample_comes_back(generation, tmp_path):
    write_folder(str(tmp_path), FULL, random_model(FULL).state_dict(), TOKENIZER, is_chat=False, generation=generation)
    assert read_folder(str(tmp_path)).generation == generation


def test_what_the_code_in_the_folder_cannot_return_is_refused(tmp_path):
    export(tmp_path, FULL)
    model = theirs(tmp_path, FULL)
    with pytest.raises(ValueError, match=r"^output_hidden_states: this model does not return them"):
        model(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert not model.accepts_loss_kwargs, "Trainer divides by its accumulation steps"


def test_spellings_that_say_nothing_else_are_read(tmp_path):
    export(tmp_path, MODELS["stock"])
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    theta = content.pop("rope_parameters")["rope_theta"]
    content |= {"rope_theta": theta, "rope_scaling": {"rope_type": "default"}, "head_dim": 16, "sliding_window": None,
                "layer_types": ["full_attention"] * 4}  # fmt: skip
    path.write_text(json.dumps(content))
    assert read_folder(str(tmp_path)).config == MODELS["stock"]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[1]", b"{", b"\xff\xfe", "a folder"])
def test_a_file_that_is_missing_or_damaged_is_named(file, content, tmp_path):
    export(tmp_path, FULL)
    (tmp_path / file).unlink()
    if content == "a folder":
        (tmp_path / file).mkdir()
    elif content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(NanochatError, match=file.replace(".", r"\.")):
        read_folder(str(tmp_path))


def test_a_flipped_bit_of_the_weights_is_seen_and_others_folders_have_no_hash(tmp_path):
    export(tmp_path, FULL)
    weights = tmp_path / "model.safetensors"
    assert (tmp_path / "SHA256SUMS").read_text() == (
        hashlib.sha256(weights.read_bytes()).hexdigest() + "  model.safetensors\n"
    )
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not what SHA256SUMS says\. Fetch it again"):
        read_folder(str(tmp_path))
    (tmp_path / "SHA256SUMS").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="SHA256SUMS: cannot be read"):
        read_folder(str(tmp_path))
    (tmp_path / "SHA256SUMS").unlink()
    assert read_folder(str(tmp_path)).config == FULL
    (tmp_path / "export_unfinished").write_text("{}")
    with pytest.raises(CheckpointError, match="is of an export that was ended"):
        read_folder(str(tmp_path))


def test_weights_in_several_files_are_read_and_paths_out_of_the_folder_are_not(tmp_path):
    model = export(tmp_path, FULL)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for number in range(2):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[number::2]}
        save_file(part, tmp_path / file)
        where |= dict.fromkeys(part, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert torch.equal(read_folder(str(tmp_path)).tensors["lm_head.weight"], model.lm_head.weight)
    index.write_text(json.dumps({"weight_map": where | {names[0]: "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"has no weights \.\./secret\.safetensors"):
        read_folder(str(tmp_path))
