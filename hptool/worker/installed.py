"""What is installed beside torch and Megatron-core, and who uses it; imports none of it."""

import importlib.util

from hptool.base_config import BaseConfig

#: In the environment: what compiles, by torch's name for it (inductor, aot_eager, ...), or off, for nodes without a C
#: compiler and for those who doubt torch's.
COMPILER_VARIABLE = "HPTOOL_COMPILE"

TRANSFORMER_ENGINE = "transformer_engine"

#: What Megatron-core's dynamic engine cannot do without: its attention asks for version 2.7.3 or newer.
FLASH_ATTENTION = "flash_attn"


def is_installed(package: str) -> bool:
    """It can be imported, as far as one can say without doing so."""
    return importlib.util.find_spec(package) is not None


def uses_transformer_engine(config: BaseConfig) -> bool:
    """Its layers are taken: it is installed, asked for (NeMo's default), and has what the model needs."""
    return (
        may_use_transformer_engine(config) and config.trainer.accelerator != "cpu" and is_installed(TRANSFORMER_ENGINE)
    )


def may_use_transformer_engine(config: BaseConfig) -> bool:
    """The config lets its layers be taken, and they have what the model needs."""
    model = config.model
    return model.transformer_engine and model.use_flash_attention and not config.is_alibi
