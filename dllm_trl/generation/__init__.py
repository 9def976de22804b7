from .configuration import DiffusionGenerationConfig
from .mixin import DiffusionGenerateOutput, DiffusionGenerationMixin, generate_rollouts


__all__ = ["DiffusionGenerateOutput", "DiffusionGenerationConfig", "DiffusionGenerationMixin", "generate_rollouts"]
