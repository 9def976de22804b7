import math
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ..generation.configuration import reject_renamed
from ..objectives import OBJECTIVES
from .advantages import SCALES
from .counts import check_counts, is_count
from .strategy_arguments import StrategyArguments


@dataclass
class DiffusionGRPOConfig(StrategyArguments, GRPOConfig):
    r"""
    Configuration class for the [`DiffusionGRPOTrainer`]: [`~trl.GRPOConfig`] and what diffusion language models add.

    This class includes only the parameters that are specific to diffusion language models. All others keep the name,
    the meaning and the default they have in [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the rollout

        block_length (`int`, *optional*):
            Tokens denoised together, in rollout and training alike. `None` takes the model's `config.block_size`. Full
            attention: the blocks of semi-autoregressive decoding; `None` decodes the whole response as one.
        denoising_steps (`int`, *optional*):
            Upper bound of denoising steps per block. `None` takes what the objective asks for (`"just_grpo"`,
            `"block_reveal"`), else `block_length`.
        remasking_strategy (`str`, *optional*):
            Which masked tokens are committed in a step, see [`DiffusionGenerationConfig`]. `None` takes what the
            objective asks for, else the checkpoint's, else `"low_confidence_dynamic"`. Against what an objective asks
            for it is respected, with a warning.
        parameters of the strategies (*optional*):
            By their names, as in [`DiffusionGenerationConfig`]. `None` takes the checkpoint's, else the default of the
            strategy.
        cache (`str`, *optional*):
            Full attention: `"none"`, or Fast-dLLM's approximate `"prefix"` and `"dual"`, which make the rollout
            faster. Its tokens are scored without a cache all the same; `sampling/sampling_logp_difference` says how
            far apart the two are.
        num_slots (`int`, *optional*):
            Responses in flight at a time, per process. `None` decodes all at once. Changes speed and memory, never
            results.

        > Parameters that control which tokens are scored

        objective (`str`, *optional*):
            What is masked, what is scored and what becomes of it: a name from `dllm_trl.objectives.OBJECTIVES`. `None`
            takes the trainer's own, which for [`DiffusionGRPOTrainer`] replays the rollout (`"trace"`).
        objective_kwargs (`dict[str, Any]` or `str`, *optional*):
            Options of the objective, e.g. `{"num_samples": 4}`.
        rounds_per_forward (`int`, *optional*, defaults to `1`):
            Full attention: rounds of a micro-batch that go through the model at a time. With several forwards each is
            computed again in the backward pass: memory is that of one, however many rounds there are.
        num_scored_pads (`int`, *optional*, defaults to `0`):
            How many of the tokens that were decoded after the first EOS are scored, per response. `None` scores all.
        on_policy_check (`str`, *optional*, defaults to `"warn"`):
            What happens when the log-probabilities recorded during the rollout and those the trainer computes from the
            same weights differ: in float32, a difference above 1e-3 raises an error; in half precision, a mean above
            0.05 warns with `"warn"` and raises with `"error"`. `"off"` skips the comparison. It needs a rollout
            without top-k, top-p, min-p and repetition penalty, and an objective that replays the rollout.
        use_rollout_logprobs (`bool`, *optional*, defaults to `False`):
            Whether the log-probabilities recorded during the rollout serve as old log-probabilities, which saves the
            forward pass that recomputes them. Under the same conditions as `on_policy_check`.

        > Parameters that control rewards and advantages

        overlong_slack (`int`, *optional*):
            A response of at least `max_completion_length - overlong_slack` tokens is wrong: its rewards become 0. With
            0, only a response that reaches the limit without EOS is. `None` leaves the rewards alone.
        accuracy_range (`list[float]`, *optional*):
            Groups whose share of accurate responses lies outside `[low, high]` are dropped: nothing of them is scored.
            A response is accurate if the first reward function gives more than 0.5.
        scale_rewards (`str` or `bool`, *optional*, defaults to `"group"`):
            As in [`~trl.GRPOConfig`]. Additionally `"population"`: z-score within the group with the population
            standard deviation and no epsilon, the advantage of the TraceRL paper; `"leave_one_out"`: the reward minus
            the mean of the others in the group, the advantage of the DiffuCoder paper; `"leave_one_out_scaled"`: that
            over TRL's standard deviation.
        reward_chunk_length (`int`, *optional*, defaults to `200`):
            What the numbers are of where a reward function returns a list for a response: chunks of this many response
            tokens. `None`: denoising steps, in order.
        gamma (`float`, *optional*):
            What a reward is worth one denoising step earlier. It acts where tokens have rewards of their own: with a
            value model, and where a reward function returns lists. `None`: 0.99 with lists, else 1.

        > Parameters that control the KL term

        kl_target (`str`, *optional*, defaults to `"ref"`):
            What the policy is kept close to when `beta` is not 0: `"ref"`, the reference model as in TRL, or `"old"`,
            the policy at the start of the step, which needs no second model. The gradient of the latter is zero on the
            first update after a rollout: it acts from the second update on.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["objective_kwargs"]

    block_length: int | None = field(
        default=None,
        metadata={"help": "Tokens denoised together. `None` takes the model's `config.block_size`."},
    )
    denoising_steps: int | None = field(
        default=None,
        metadata={"help": "Upper bound of denoising steps per block. `None` takes `block_length`."},
    )
    remasking_strategy: str | None = field(
        default=None,
        metadata={
            "help": "Which masked tokens are committed in a step. `None` takes the checkpoint's, else "
            "'low_confidence_dynamic'."
        },
    )
    cache: str | None = field(
        default=None,
        metadata={
            "help": "Cache of rollouts with full attention: 'none', or the approximate 'prefix' and 'dual'. Block "
            "attention always has an exact one."
        },
    )
    objective: str | None = field(
        default=None,
        metadata={"help": "What is masked, scored and made of it, by name. `None` takes the trainer's own."},
    )
    objective_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of the objective, as a dictionary (JSON on the command line)."},
    )
    rounds_per_forward: int = field(
        default=1,
        metadata={"help": "Full attention: rounds of a micro-batch that go through the model at a time."},
    )
    num_slots: int | None = field(
        default=None,
        metadata={"help": "Responses in flight at a time, per process. `None` decodes all at once."},
    )
    num_scored_pads: int | None = field(
        default=0,
        metadata={
            "help": "How many of the tokens that were decoded after the first EOS are scored, per response. `None` "
            "scores all."
        },
    )
    on_policy_check: str = field(
        default="warn",
        metadata={
            "help": "What happens when rollout and trainer log-probabilities differ: in float32 an error above 1e-3, "
            "in half precision a mean above 0.05 warns ('warn') or raises ('error'). 'off' skips the comparison.",
            "choices": ["warn", "error", "off"],
        },
    )
    use_rollout_logprobs: bool = field(
        default=False,
        metadata={"help": "Whether the log-probabilities recorded during the rollout serve as old log-probabilities."},
    )
    overlong_slack: int | None = field(
        default=None,
        metadata={
            "help": "Responses of at least `max_completion_length - overlong_slack` tokens get reward 0 (with 0: only "
            "without EOS). `None` leaves the rewards alone."
        },
    )
    accuracy_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "Groups whose share of accurate responses (first reward above 0.5) lies outside [low, high] are "
            "dropped."
        },
    )
    reward_chunk_length: int | None = field(
        default=200,
        metadata={
            "help": "Tokens of a chunk where reward functions return lists with a number per chunk. `None`: they have "
            "a number per denoising step."
        },
    )
    gamma: float | None = field(
        default=None,
        metadata={"help": "Discount per denoising step. `None`: 0.99 where reward functions return lists, else 1."},
    )
    kl_target: str = field(
        default="ref",
        metadata={
            "help": "What the policy is kept close to when `beta` is not 0: 'ref', a reference model, or 'old', the "
            "policy at the start of the step.",
            "choices": ["ref", "old"],
        },
    )

    def __new__(cls, *args, **kwargs):
        reject_renamed(kwargs)
        return super().__new__(cls)

    def __post_init__(self):
        if self.use_cpu and self.bf16 is None:
            self.bf16 = False  # TRL's default is for accelerators
        super().__post_init__()
        check_counts(
            self,
            "block_length",
            "denoising_steps",
            "num_slots",
            "rounds_per_forward",
            "num_iterations",
            "reward_chunk_length",
        )
        check_counts(self, "num_scored_pads", "overlong_slack", least=0)
        for name, choices in (("on_policy_check", ("warn", "error", "off")), ("kl_target", ("ref", "old"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, but is {getattr(self, name)!r}.")
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {sorted(OBJECTIVES)}, but is {self.objective!r}.")
        for name, options in self.objective_options().items():
            OBJECTIVES[name](**options)  # which raises for values that it cannot have
        if self.accuracy_range is not None and not (
            len(self.accuracy_range) == 2 and 0 <= self.accuracy_range[0] <= self.accuracy_range[1] <= 1
        ):
            raise ValueError(
                f"`accuracy_range` must be two numbers 0 <= low <= high <= 1, but is {self.accuracy_range}."
            )
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            raise ValueError(f"`gamma` must lie in [0, 1], but is {self.gamma}.")
        if self.max_completion_length is None or not is_count(self.max_completion_length):
            raise ValueError(
                f"`max_completion_length` must be at least 1, but is {self.max_completion_length}: it is the number "
                "of response tokens that are decoded."
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"`temperature` must be above 0, but is {self.temperature}: at 0 all generations of a prompt are "
                "equal and there is nothing to learn. The default is 1.0."
            )
        scales = ("group", "batch", "none", *SCALES)
        if self.scale_rewards not in scales:
            raise ValueError(f"`scale_rewards` must be one of {scales}, but is {self.scale_rewards!r}.")
        if self.scale_rewards in SCALES and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"`scale_rewards={self.scale_rewards!r}` needs `multi_objective_aggregation='sum_then_normalize'`."
            )
        if self.kl_target == "old" and self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` needs a reference model, but `kl_target='old'` uses none. Set "
                "`sync_ref_model=False`, or `kl_target='ref'`."
            )

    def objective_options(self) -> dict[str, dict[str, Any]]:
        """Objectives whose options are fields of this config, with those options; the first is the trainer's own."""
        return {"trace": {}}
