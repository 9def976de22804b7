"""The only place that knows how transformers, PEFT and TRL keep things inside, version by version."""

import importlib
import importlib.util
import sys


class _LazyClasses(dict):
    """`{name: class or "module:Class"}` that imports a class the first time it is asked for."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if isinstance(value, str):
            module, name = value.split(":")
            value = self[key] = getattr(importlib.import_module(module), name)
        return value

    def values(self):
        return [self[key] for key in self]

    def items(self):
        return [(key, self[key]) for key in self]


def register_lazy_configs(families: dict[str, str]) -> None:
    """
    Teach `AutoConfig` model types without importing their modules.

    `AutoConfig.register` takes a class, and importing one model class costs seconds. Every way to one of our models
    begins by looking up its model type here, which imports the family's file, which registers its classes the ordinary
    way.

    Args:
        families (`dict[str, str]`):
            Model type -> `"module:ConfigClass"`.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING._extra_content = _LazyClasses({**CONFIG_MAPPING._extra_content, **families})


def copy_weight_conversions(model_type: str, like: str) -> None:
    """Load and save `model_type`'s weights with the renamings and stackings that transformers has for `like`."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    register_checkpoint_conversion_mapping(model_type, get_checkpoint_conversion_mapping(like), overwrite=True)


def register_lora_targets(model_type: str, target_modules: list[str]) -> None:
    """Give PEFT the LoRA modules of a model type it does not know. Does nothing as long as nobody imported PEFT."""
    if "peft" in sys.modules:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as defaults

        defaults.setdefault(model_type, target_modules)


def use_small_logprob_tiles(device_type: str) -> None:
    """
    Make TRL's fused head work on tiles that fit a CPU: twice as fast there, and an eighth of the memory.

    The head projects 4096 tokens onto 32768 vocabulary entries at a time, half a gigabyte per temporary in float32.
    That suits a GPU, so it is left alone there. The result is the same.
    """
    if device_type == "cpu":
        from trl.trainer import utils

        utils._CHUNKED_LOGPROB_CHUNK_SIZE = 2048
