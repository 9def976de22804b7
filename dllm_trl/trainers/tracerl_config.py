import math
from dataclasses import dataclass, field
from typing import Any

from transformers import SchedulerType

from .counts import check_counts
from .diffusion_grpo_config import DiffusionGRPOConfig
from .gae import VALUE_LOSS_NORMS


# They need to know the loss of an evaluation, or the schedule's own arguments
_NO_SCHEDULES = {"reduce_lr_on_plateau", "greedy", "warmup_stable_decay", "cosine_with_min_lr"}
VALUE_SCHEDULES = sorted({kind.value for kind in SchedulerType} - _NO_SCHEDULES)


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

        > Parameters that control the value model

        value_model (`str`, *optional*):
            Critic that says what each token may expect, so that advantages differ within a response: `"copy"`, with a
            backbone of its own that begins as the policy's; `"adapter"`, the policy's backbone under a LoRA adapter
            and a head of its own, which needs next to no memory; or a checkpoint, of a critic or of a model of the
            policy's family. `None`: there is none.
        value_learning_rate (`float`, *optional*, defaults to `5e-6`):
            Learning rate of the critic. An adapter needs one that is larger by an order of magnitude.
        value_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Its schedule, as `lr_scheduler_type`.
        value_lr_warmup_steps (`int`, *optional*, defaults to `0`):
            Updates in which the schedule warms up.
        value_lora_rank (`int`, *optional*, defaults to `16`):
            Rank of the adapter of `value_model="adapter"`.
        value_clip (`float`, *optional*, defaults to `0.2`):
            How far a value may move from that of the rollout before its gradient is cut off.
        value_loss_norm (`str`, *optional*, defaults to `"token"`):
            `"token"`: the loss is the mean over all scored tokens. The mean over responses of, `"masked"`, the mean
            over their scored tokens or, `"response"`, the sum over these divided by `max_completion_length`.
        value_epochs (`int`, *optional*, defaults to `1`):
            How often the critic goes through a rollout, each time in as many updates as the policy, whose
            `num_iterations` this is not.
        value_update_every (`int`, *optional*, defaults to `1`):
            The critic learns from every `value_update_every`-th rollout.
        value_warmup_updates (`int`, *optional*, defaults to `0`):
            Optimizer steps at the beginning in which the critic learns alone: the policy stands still.
        gae_lambda (`float`, *optional*, defaults to `1.0`):
            How far advantages trust rewards (1) over the critic's values of the next step (0).
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
        metadata={"help": "Critic: 'copy', 'adapter' or a checkpoint. `None`: there is none."},
    )
    value_learning_rate: float = field(default=5e-6, metadata={"help": "Learning rate of the critic."})
    value_lr_scheduler_type: str = field(
        default="constant",
        metadata={"help": "Schedule of the critic's learning rate.", "choices": VALUE_SCHEDULES},
    )
    value_lr_warmup_steps: int = field(
        default=0, metadata={"help": "Updates in which the schedule of the critic's learning rate warms up."}
    )
    value_lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter of `value_model='adapter'`."})
    value_clip: float = field(
        default=0.2,
        metadata={"help": "How far a value may move from that of the rollout before its gradient is cut off."},
    )
    value_loss_norm: str = field(
        default="token",
        metadata={
            "help": "What the critic's loss is a mean over: all scored tokens ('token'), or responses, of the mean "
            "over their tokens ('masked') or of the sum over `max_completion_length` ('response').",
            "choices": list(VALUE_LOSS_NORMS),
        },
    )
    value_epochs: int = field(default=1, metadata={"help": "How often the critic goes through a rollout."})
    value_update_every: int = field(
        default=1, metadata={"help": "The critic learns from every `value_update_every`-th rollout."}
    )
    value_warmup_updates: int = field(
        default=0, metadata={"help": "Optimizer steps at the beginning in which the critic learns alone."}
    )
    gae_lambda: float = field(
        default=1.0,
        metadata={"help": "How far advantages trust rewards (1) over the critic's values of the next step (0)."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, "shrink", "value_lora_rank", "value_epochs", "value_update_every")
        check_counts(self, "value_lr_warmup_steps", "value_warmup_updates", least=0)
        if self.value_model in (True, False):  # from a file
            self.value_model = "copy" if self.value_model else None
        if self.value_model is not None and (not isinstance(self.value_model, str) or not self.value_model):
            raise ValueError(
                f'`value_model` must be "copy", "adapter" or a checkpoint, but is {self.value_model!r}. A module goes '
                "to the trainer: `TraceRLTrainer(value_model=...)`."
            )
        for name, choices in (
            ("value_loss_norm", VALUE_LOSS_NORMS),
            ("value_lr_scheduler_type", VALUE_SCHEDULES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, but is {getattr(self, name)!r}.")
        if self.value_lr_warmup_steps and self.value_lr_scheduler_type == "constant":
            raise ValueError(
                f'`value_lr_warmup_steps={self.value_lr_warmup_steps}` has no effect on the schedule "constant". '
                'Set `value_lr_scheduler_type="constant_with_warmup"`.'
            )
        if not 0 <= self.value_learning_rate < math.inf:
            raise ValueError(f"`value_learning_rate` must be at least 0, but is {self.value_learning_rate}.")
        if not 0 < self.value_clip:
            raise ValueError(f"`value_clip` must be above 0, but is {self.value_clip}. `inf` does not clip.")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"`gae_lambda` must lie in [0, 1], but is {self.gae_lambda}.")

    def objective_options(self) -> dict[str, dict[str, Any]]:
        return {"trace": {"shrink": self.shrink}}
