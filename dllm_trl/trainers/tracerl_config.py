from dataclasses import dataclass, field

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
        value_model (`str` or `bool`, *optional*):
            Value model of TraceRL. Not available yet: only `None` and `False` are accepted.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount over denoising steps of the value model's returns.
        gae_lambda (`float`, *optional*, defaults to `1.0`):
            Lambda over denoising steps of the value model's advantages.
    """

    shrink: int = field(
        default=1,
        metadata={
            "help": "Merges every `shrink` neighbouring denoising steps of a block into one when the rollout is "
            "replayed."
        },
    )
    value_model: str | None = field(
        default=None,
        metadata={"help": "Value model of TraceRL. Not available yet: only `None` and `False` are accepted."},
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount over denoising steps of the value model's returns."})
    gae_lambda: float = field(
        default=1.0, metadata={"help": "Lambda over denoising steps of the value model's advantages."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.shrink < 1:
            raise ValueError(f"`shrink` must be at least 1, but is {self.shrink}.")
        if self.value_model:
            raise ValueError(
                f"`value_model={self.value_model!r}` is not available yet. Leave it `None`: advantages are then those "
                "of the group of responses."
            )
        if self.gamma != 1.0 or self.gae_lambda != 1.0:
            raise ValueError("`gamma` and `gae_lambda` act on the value model only, which is not available yet.")
