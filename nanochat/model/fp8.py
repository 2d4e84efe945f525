"""Linear layers to FP8 on Hopper and newer GPUs, through torchao: tensorwise scales, float32 master weights.

Left in bf16: the head (the loss multiplies by its weight directly), layers whose sizes are no multiples of 16, and the
small value gates. Source: arXiv:2209.05433; nanochat trains its fastest runs this way.
"""

from torch import nn

from nanochat.errors import ConfigError
from nanochat.model.gpt import GPT

MIN_CHANNELS = 128
"""Below this the conversion costs more than the faster product saves. Source: nanochat base_train.py@92d63d4."""


def convert_to_fp8(model: GPT) -> None:
    """Replace the blocks' large linear layers in place. Raises: ConfigError if torchao is not installed."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as err:
        raise ConfigError("fp8=True: needs torchao. Run: pip install torchao") from err

    def fits(module: nn.Module, name: str) -> bool:
        return (
            isinstance(module, nn.Linear)
            and name != "lm_head"
            and min(module.in_features, module.out_features) >= MIN_CHANNELS
            and module.in_features % 16 == module.out_features % 16 == 0
        )

    convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name("tensorwise"), module_filter_fn=fits)
