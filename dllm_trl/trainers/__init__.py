"""Trainers: subclasses of TRL's. Imported when first used, since TRL takes seconds to import."""

import importlib


_EXPORTS = {
    "BlockSizeCurriculum": "curriculum",
    "CoupledGRPOConfig": "coupled_grpo_config",
    "CoupledGRPOTrainer": "coupled_grpo_trainer",
    "DiffusionGRPOConfig": "diffusion_grpo_config",
    "DiffusionGRPOTrainer": "diffusion_grpo_trainer",
    "DiffusionSFTConfig": "sft_config",
    "DiffusionSFTTrainer": "sft_trainer",
    "RandomMaskGRPOConfig": "random_mask_grpo_config",
    "RandomMaskGRPOTrainer": "random_mask_grpo_trainer",
    "TraceRLConfig": "tracerl_config",
    "TraceRLTrainer": "tracerl_trainer",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
