from .configuration import DiffusionGenerationConfig, denoising_steps_per_block
from .mixin import DiffusionGenerateOutput, DiffusionGenerationMixin, generate_rollouts


__all__ = [
    "DiffusionGenerateOutput",
    "DiffusionGenerationConfig",
    "DiffusionGenerationMixin",
    "denoising_steps_per_block",
    "generate_rollouts",
]
