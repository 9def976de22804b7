from dataclasses import dataclass, field
from typing import Any

from .counts import check_counts
from .diffusion_grpo_config import DiffusionGRPOConfig


@dataclass
class TraceRLConfig(DiffusionGRPOConfig):
    r"""
    Configuration class for the [`TraceRLTrainer`].

    This class includes only the parameters that are specific to TraceRL. All others are documented in
    [`DiffusionGRPOConfig`], [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        shrink (`int`, *optional*, defaults to `1`):
            Merges every `shrink` neighbouring denoising steps of a block into one when the rollout is replayed: fewer
            rounds to compute, at the price of contexts that hold less than the rollout saw. 1 replays it exactly.
    """

    shrink: int = field(
        default=1,
        metadata={
            "help": "Merges every `shrink` neighbouring denoising steps of a block into one when the rollout is "
            "replayed."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, "shrink")

    def objective_options(self) -> dict[str, dict[str, Any]]:
        return {"trace": {"shrink": self.shrink}}
