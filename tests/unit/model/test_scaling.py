"""The depth dial: its whole table pinned, checked against published runs of nanochat and by hand."""

import math

import pytest

from nanochat.config.model import ModelConfig, stock
from nanochat.config.pretrain import PretrainConfig
from nanochat.model import scaling
from nanochat.model.gpt import GPT
from nanochat.training.plan import Plan, learning_rates, resolve, resolve_model

VOCAB, T = 32_768, 2048


def plan_of(depth: int, **changes) -> Plan:
    return resolve(PretrainConfig(depth=depth, **changes), VOCAB, T)


# depth: width, heads, parameters of embedding, value embeddings, matrices and scalars,
#        horizon, batch, steps, lr factor squared, weight decay, FLOPs per token
TABLE = {
    4: (256, 2, 8_388_608, 16_777_216, 3_145_776, 9, 138_412_608, 2**18, 528, 0.5, 1.889903, 80_216_352),
    8: (512, 4, 16_777_216, 67_108_864, 25_166_016, 17, 503_318_784, 2**18, 1920, 0.5, 0.5197231, 295_699_584),
    12: (768, 6, 25_165_824, 150_994_944, 84_935_088, 25, 1_321_210_944, 2**19, 2520, 1, 0.28, 759_695_904),
    16: (1024, 8, 33_554_432, 268_435_456, 201_327_360, 33, 2_818_581_504, 2**19, 5376, 1, 0.1312501, 1_585_451_520),
    20: (1280, 10, 41_943_040, 419_430_400, 393_217_200, 41, 5_221_922_880, 2**20, 4980, 2, 0.1001878, 2_886_212_640),
    24: (1536, 12, 50_331_648, 603_979_776, 679_478_976, 49, 8_757_727_488, 2**20, 8352, 2, 0.0597384, 4_775_225_472),
    26: (1664, 13, 54_525_952, 708_837_376, 863_897_580, 53, 11_021_082_384, 2**20, 10510, 2, 0.0474702, 5_991_051_144),
    32: (
        2048, 16, 67_108_864, 1_073_741_824, 1_610_615_808, 65, 20_132_696_064, 2**21, 9600, 4, 0.0367501,
        10_770_991_104,
    ),
}  # fmt: skip


@pytest.mark.parametrize("depth", TABLE)
def test_the_table_of_the_dial(depth):
    width, heads, embedding, values, matrices, scalars, horizon, batch, steps, lr_squared, decay, flops = TABLE[depth]
    plan = plan_of(depth)
    model = plan.model
    assert (model.n_layer, model.n_embd, model.n_head, model.n_kv_head) == (depth, width, heads, heads)
    counts = scaling.parameter_counts(model)
    assert counts == {
        "embedding": embedding, "value_embeddings": values, "head": embedding, "matrices": matrices,
        "scalars": scalars, "total": 2 * embedding + values + matrices + scalars,
    }  # fmt: skip
    assert scaling.horizon_tokens(model, 12.0) == horizon
    assert (plan.tokens_per_step, plan.num_steps) == (batch, steps)
    assert plan.lr_factor == pytest.approx(math.sqrt(lr_squared))
    assert plan.weight_decay == pytest.approx(decay, rel=1e-5)
    assert plan.flops_per_token == flops


def test_published_runs_of_nanochat_come_out():
    """Sources: dev/LEADERBOARD.md of karpathy/nanochat (runs 1, 3, 4); the public logs of a d12 trained with smear."""
    assert plan_of(24, global_batch_tokens=2**19).num_steps == 16_704  # run 1, 12 tokens a parameter
    # Run 3: 7,226, with value gates of 32 channels instead of 12, which makes 7,226.01 of our 7,225.99.
    assert plan_of(26, tokens_per_parameter=8.25).num_steps == 7_225
    assert plan_of(26, tokens_per_parameter=8.25).tokens_per_step == 2**20
    assert plan_of(26, tokens_per_parameter=7.25, global_batch_tokens=2**19).num_steps == 12_700  # run 4
    d12 = plan_of(12, window_pattern="L", smear=True, global_batch_tokens=2**16)
    assert scaling.parameter_counts(d12.model)["total"] == 286_261_730
    assert d12.flops_per_token == pytest.approx(887e6, rel=1e-3)
    assert d12.lr_factor == pytest.approx(0.3536, rel=1e-3)
    assert d12.weight_decay == pytest.approx(0.099, rel=1e-2)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(sequence_len=16, vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, n_embd=64),
        ModelConfig(sequence_len=16, vocab_size=64, n_layer=4, n_head=2, n_kv_head=2, n_embd=32, smear=True),
        stock(ModelConfig(sequence_len=16, vocab_size=65, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)),
    ],
)
def test_parameters_are_counted_as_they_are(config):
    counted = dict.fromkeys(("embedding", "value_embeddings", "head", "matrices", "scalars"), 0)
    kinds = {
        "transformer.wte": "embedding",
        "value_embeds": "value_embeddings",
        "lm_head": "head",
        "transformer.h": "matrices",
    }
    for name, parameter in GPT(config).named_parameters():
        kind = next((kind for prefix, kind in kinds.items() if name.startswith(prefix)), "scalars")
        counted[kind] += parameter.numel()
    counts = scaling.parameter_counts(config)
    assert counts == counted | {"total": sum(counted.values())}


def test_flops_of_a_token_by_hand():
    """Two layers of width 8: the first sees a window of 128 keys, the second the whole row of 1,024."""
    config = ModelConfig(
        sequence_len=1024, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=8, window_pattern="SL",
        value_embeddings=False,
    )  # fmt: skip
    assert config.windows == [256, 1024]
    block = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 8 * 32 + 32 * 8  # q, k, v, projection, two layers of the MLP
    products = 2 * (2 * block + 64 * 8)  # a multiplication and an addition per parameter
    attention = 2 * (2 * 8 * 256) + 2 * (2 * 8 * 1024)  # scores and values
    assert scaling.flops_per_token(config, 1024) == 3 * (products + attention)  # backward costs twice the forward
    shorter = 2 * (2 * 8 * 100) * 2
    assert scaling.flops_per_token(config, 100) == 3 * (products + shorter)


@pytest.mark.parametrize(
    ("depth", "head_dim", "shape"), [(12, 128, (768, 6)), (4, 64, (256, 4)), (5, 128, (384, 3)), (1, 128, (128, 1))]
)
def test_width_is_64_a_layer_in_whole_heads(depth, head_dim, shape):
    assert scaling.model_shape(depth, head_dim) == shape


def test_rules_of_batch_rate_and_decay_by_hand():
    assert scaling.batch_tokens(1000, 1000) == 2**19
    assert scaling.batch_tokens(6_200, 1_000) == 2**20  # 6.2^0.383 = 2.01
    assert scaling.batch_tokens(405, 1_000) == 2**19  # 0.405^0.383 = 0.7074, above 2^-0.5: nearer to 1 than to 1/2
    assert scaling.batch_tokens(404, 1_000) == 2**18
    assert scaling.batch_lr_factor(2**21) == 2.0
    assert scaling.scaled_weight_decay(0.2, 2**17, 500, 1_000) == pytest.approx(0.2 * 0.5 * 2)


def test_the_reference_is_depth_12_with_the_same_parts():
    model = resolve_model(PretrainConfig(depth=4, architecture="stock", head_dim=64), 8192, 512)
    d12 = resolve_model(PretrainConfig(depth=12, architecture="stock"), 8192, 512)
    assert scaling.reference_tokens(model, 12.0) == scaling.horizon_tokens(d12, 12.0)


def test_groups_hold_every_parameter_once_with_nanochats_rates():
    config = ModelConfig(sequence_len=16, vocab_size=64, n_layer=4, n_head=4, n_kv_head=2, n_embd=192, smear=True)
    names = [name for name, _ in GPT(config).named_parameters()]
    groups = scaling.parameter_groups(config, names, learning_rates(PretrainConfig()), lr_factor=2.0)
    assert sorted(name for group in groups for name in group.names) == sorted(names)
    rules = {group.names[0]: (group.kind, group.lr, group.weight_decay, group.betas) for group in groups}
    # The batch doubles every rate; (192 / 768)^-0.5 doubles those of the tables and the head once more.
    assert rules == {
        "lm_head.weight": ("adamw", 0.008 * 2 * 2, 0.01, (0.8, 0.96)),
        "transformer.wte.weight": ("adamw", 0.3 * 2 * 2, 0.001, (0.8, 0.995)),
        "value_embeds.1.weight": ("adamw", 0.15 * 2 * 2, 0.01, (0.8, 0.995)),
        "resid_lambdas": ("adamw", 0.005 * 2, 0.05, (0.8, 0.95)),
        "x0_lambdas": ("adamw", 0.5 * 2, 0.0, (0.96, 0.95)),
        "smear_lambda": ("adamw", 0.2 * 2, 0.0, (0.8, 0.95)),
        "backout_lambda": ("adamw", 0.2 * 2, 0.0, (0.8, 0.95)),
        "transformer.h.0.attn.c_q.weight": ("muon", 0.02 * 2, 0.0, (0.8, 0.95)),
    }
