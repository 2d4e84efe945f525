"""architecture=stock against transformers' NanoChatForCausalLM, weights carried over by name, both ways."""

import pytest
import torch
from naive_gpt import randomise

from nanochat.config.model import STOCK, ModelConfig, stock
from nanochat.errors import ConfigError
from nanochat.model.gpt import GPT
from nanochat.model.transformers_names import from_transformers, name_map, to_transformers, transformers_config


def stock_config(**changes) -> ModelConfig:
    sizes = {"sequence_len": 32, "vocab_size": 100, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    return stock(ModelConfig(**(sizes | changes)))


def their_model(config: ModelConfig) -> torch.nn.Module:
    from transformers import NanoChatConfig, NanoChatForCausalLM

    special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
    return NanoChatForCausalLM(NanoChatConfig(**transformers_config(config), **special)).eval()


@pytest.mark.parametrize("changes", [
    {}, {"n_kv_head": 4}, {"n_kv_head": 1}, {"rope_theta": 1e5}, {"logit_softcap": 30.0}, {"norm_eps": 1e-3},
])  # fmt: skip
def test_logits_equal_theirs(changes):
    config = stock_config()
    config = ModelConfig(**(vars(config) | changes))
    ours, theirs = GPT(config), their_model(config)
    randomise(ours)
    missing, unexpected = theirs.load_state_dict(to_transformers(ours.state_dict(), config), strict=True)
    assert not missing
    assert not unexpected
    tokens = torch.randint(100, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
        actual = ours.logits(ours(tokens))
    assert expected.std() > 2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * config.logit_softcap)


def test_their_weights_load_here():
    config = stock_config()
    ours, theirs = GPT(config), their_model(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours.load_state_dict(from_transformers(theirs.state_dict(), config), strict=True)
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours.logits(ours(tokens)), expected, rtol=0, atol=1.5e-4)


def test_names_go_there_and_back_without_the_padding():
    config = stock_config()
    model = GPT(config)
    with torch.no_grad():
        model.embedding.weight[100:] = model.lm_head.weight[100:] = 5.0
    state = model.state_dict()
    there = to_transformers(state, config)
    assert {name: value.shape for name, value in there.items()} == {
        name: value.shape for name, value in their_model(config).state_dict().items()
    }
    back = from_transformers(there, config)
    assert set(back) == set(state)
    for name, value in state.items():
        assert torch.equal(back[name][:100], value[:100])
        assert back[name].shape == value.shape
    assert back["lm_head.weight"][100:].abs().max() == back["transformer.wte.weight"][100:].abs().max() == 0


def test_stock_values_are_their_defaults():
    from transformers import NanoChatConfig

    theirs = NanoChatConfig()
    assert theirs.rope_parameters["rope_theta"] == STOCK["rope_theta"]
    assert theirs.rms_norm_eps == STOCK["norm_eps"]
    assert theirs.final_logit_softcapping == ModelConfig().logit_softcap
    assert theirs.hidden_act == transformers_config(stock_config())["hidden_act"]
    assert theirs.tie_word_embeddings is False


@pytest.mark.parametrize("field", STOCK)
def test_any_other_part_is_refused_by_name(field):
    other = {"window_pattern": "SL", "norm_eps": None, "rope_theta": 5.0, "qk_gain": 1.2}.get(field, True)
    config = ModelConfig(**(vars(stock_config()) | {field: other}))
    if field == "rope_theta":  # their config has it too
        assert transformers_config(config)["rope_parameters"]["rope_theta"] == 5.0
        name_map(config)
    else:
        with pytest.raises(ConfigError, match=f"{field}={other}: NanoChatForCausalLM"):
            name_map(config)
