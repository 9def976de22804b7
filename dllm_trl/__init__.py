"""Train masked diffusion language models with TRL, and decode them with transformers."""

import importlib

from dllm_trl import modeling, trainers  # noqa: F401  (modeling registers every family with the Auto classes)


__version__ = "0.1.0"

# Names and the room they live in, imported when first used: PyTorch's and TRL's classes take seconds to import.
_EXPORTS = {
    "DiffusionGenerateOutput": "generation",
    "DiffusionGenerationConfig": "generation",
    "DiffusionGenerationMixin": "generation",
    "DiffusionRollout": "types",
    **dict.fromkeys(trainers.__all__, "trainers"),
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module `dllm_trl` has no attribute `{name}`")
    return getattr(importlib.import_module(f"dllm_trl.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
