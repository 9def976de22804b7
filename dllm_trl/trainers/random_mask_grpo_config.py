from dataclasses import dataclass, field
from typing import Any

from .diffusion_grpo_config import DiffusionGRPOConfig


@dataclass
class RandomMaskGRPOConfig(DiffusionGRPOConfig):
    r"""
    Configuration class for the [`RandomMaskGRPOTrainer`].

    This class includes only the parameters that are specific to masks drawn at random. All others are documented in
    [`DiffusionGRPOConfig`], [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`]; the papers' settings are in
    `recipes/configs/mmada-8b/unigrpo.yaml` and `recipes/configs/llada-8b/d1.yaml`.

    Parameters:
        > Parameters of `objective="random_mask"` (UniGRPO), the default

        ratios (`str`, *optional*, defaults to `"spaced"`):
            Share of a response that an update masks. `"spaced"`: uniform for the first of the `num_iterations` updates
            on a rollout, evenly spaced around it for the others. `"uniform"`: drawn anew for each.
        lower (`float`, *optional*, defaults to `0.0`):
            Smallest share.
        upper (`float`, *optional*, defaults to `1.0`):
            Largest share.
        num_masks (`int`, *optional*, defaults to `1`):
            Masks per update, over which a token's log-probability is averaged.
        likelihood (`str`, *optional*, defaults to `"token"`):
            `"token"`: each token has its own ratio to the old policy. `"sequence"`: all of a response have that of the
            mean over its masked tokens.

        > Parameters of `objective="diffu_grpo"` (d1)

        prompt_mask_prob (`float`, *optional*, defaults to `0.15`):
            Probability that a prompt token is masked, drawn anew for each update.
    """

    ratios: str = field(
        default="spaced",
        metadata={
            "help": "Share of a response that an update masks: evenly 'spaced' over the updates on a rollout, or "
            "drawn anew for each ('uniform').",
            "choices": ["spaced", "uniform"],
        },
    )
    lower: float = field(default=0.0, metadata={"help": "Smallest share of a response that is masked."})
    upper: float = field(default=1.0, metadata={"help": "Largest share of a response that is masked."})
    num_masks: int = field(
        default=1,
        metadata={"help": "Masks per update, over which a token's log-probability is averaged."},
    )
    likelihood: str = field(
        default="token",
        metadata={
            "help": "Whether each 'token' has its own ratio to the old policy, or all have that of the 'sequence'.",
            "choices": ["token", "sequence"],
        },
    )
    prompt_mask_prob: float = field(
        default=0.15,
        metadata={"help": "`objective='diffu_grpo'`: probability that a prompt token is masked."},
    )

    def objective_options(self) -> dict[str, dict[str, Any]]:
        names = ("ratios", "lower", "upper", "num_masks", "likelihood")
        return {
            "random_mask": {name: getattr(self, name) for name in names},
            "diffu_grpo": {"prompt_mask_prob": self.prompt_mask_prob},
        }
