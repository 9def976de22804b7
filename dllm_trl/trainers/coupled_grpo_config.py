from dataclasses import dataclass, field
from typing import Any

from .diffusion_grpo_config import DiffusionGRPOConfig


@dataclass
class CoupledGRPOConfig(DiffusionGRPOConfig):
    r"""
    Configuration class for the [`CoupledGRPOTrainer`].

    This class includes only the parameters that are specific to coupled GRPO. All others are documented in
    [`DiffusionGRPOConfig`], [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`]. Of the DiffuCoder paper's
    settings it has those that TRL has no default for; `recipes/configs/diffucoder-7b/coupled.yaml` has all of them
    (`scale_rewards="leave_one_out"`, `epsilon=0.5`, `beta=0.01`, `num_generations=10`, `num_iterations=2`).

    Parameters:
        estimate (`str`, *optional*, defaults to `"diffucoder"`):
            What becomes of a token's log-probabilities. `"diffucoder"`: the mean of that with the whole response
            masked and of that under its half of a pair of masks, divided by its probability to be in that half.
            `"pair"`: the one under its half of the pair alone, which takes two forward passes instead of three.
        lower (`float`, *optional*, defaults to `0.2`):
            Smallest share of a response that the first mask of a pair is drawn to hide.
        upper (`float`, *optional*, defaults to `0.8`):
            Largest such share.
    """

    estimate: str = field(
        default="diffucoder",
        metadata={
            "help": "What becomes of a token's log-probabilities: 'diffucoder', the paper's mean of three passes, or "
            "'pair', the one under its half of a pair of masks.",
            "choices": ["diffucoder", "pair"],
        },
    )
    lower: float = field(
        default=0.2,
        metadata={"help": "Smallest share of a response that the first mask of a pair is drawn to hide."},
    )
    upper: float = field(default=0.8, metadata={"help": "Largest such share."})

    def objective_options(self) -> dict[str, dict[str, Any]]:
        return {"coupled": {"estimate": self.estimate, "lower": self.lower, "upper": self.upper}}
