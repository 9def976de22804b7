import math
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from ..generation.configuration import reject_renamed
from ..objectives.random_mask import WEIGHTINGS
from .counts import check_counts
from .sft_loss import LOSS_NORMS


@dataclass
class DiffusionSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`DiffusionSFTTrainer`]: [`~trl.SFTConfig`] and what diffusion language models add.

    This class includes only the parameters that are specific to diffusion language models. All others keep the name,
    the meaning and the default they have in [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        objective (`str`, [`Objective`] or `Callable`, *optional*):
            What is masked and scored: a name from `dllm_trl.objectives.SFT_OBJECTIVES`, an instance, or a function of
            [`Rows`] that returns rounds.
            `None` takes the family's default: `"block"` for block attention, `"random_mask"` for full attention.
        block_length (`int`, *optional*):
            Block attention: tokens denoised together; `None` takes the model's `config.block_size`. Full attention:
            tokens of a slice of `objective="semi_ar"`, which needs it.
        loss_norm (`str`, *optional*):
            What the weighted sum of negative log-likelihoods is divided by: `"token"`, the trained tokens of the whole
            batch; `"sequence"`, each sequence's own trained tokens, then averaged over sequences; `"masked"`, the
            masked tokens of the whole batch; `"batch"`, the number of sequences. The batch is that of an optimizer
            step, over all processes. `None`: `"sequence"` for `objective="random_mask"` (LLaDA's loss) and `"semi_ar"`
            (a mean over each slice), `"masked"` for `weighting="none"` (dFactory's loss), else `"token"`.
        eos_fill (`bool`, *optional*):
            Whether documents that end are filled up with EOS tokens, which are masked, trained and counted like the
            others: decoding fills positions after EOS too. Block attention: to the end of the last block. Full
            attention: to the longest sequence of the optimizer step (of all processes and accumulation steps), or to
            `eos_fill_length`. Documents that were cut at `max_length` do not end and are not filled. `None`: yes, but
            for `objective="ar"` and `"trace"`, which train no fill.
        eos_fill_length (`int`, *optional*):
            Full attention: documents that end are filled up to this many tokens, in evaluation too. With `None`,
            evaluation fills nothing, so that its loss does not depend on which sequences share a batch.
        noise_per (`str`, *optional*, defaults to `"block"`):
            With `objective="block"`: a noise level per `"block"` (BD3LM) or per `"sequence"` (as SDAR was trained).
        noise_eps (`float`, *optional*, defaults to `1e-3`):
            Smallest probability with which a token is masked.
        noise_max (`float`, *optional*, defaults to `1.0`):
            Largest probability with which a token is masked.
        antithetic (`bool`, *optional*, defaults to `True`):
            Whether the noise levels of a batch are spread evenly over [0, 1) instead of drawn independently.
        weighting (`str`, *optional*, defaults to `"elbo"`):
            With `objective="random_mask"`: weight of a masked token. `"elbo"`: 1 / mask probability (LLaDA, MDLM);
            `"cart"`: by its distance to visible tokens (Dream); `"mean"`: each sequence's loss is the mean over its
            masked tokens; `"none"`: 1, and the loss is the mean over all masked tokens.
        cart_p (`float`, *optional*, defaults to `0.3`):
            With `weighting="cart"`: parameter of the geometric distribution, in (0, 1].
        shrink (`int`, *optional*, defaults to `1`):
            With `objective="trace"`: merges every `shrink` neighbouring steps of a block (full attention: of the
            response).
        rounds_per_forward (`int`, *optional*, defaults to `1`):
            Full attention: rounds of a micro-batch that go through the model at a time. Only `objective="trace"` has
            more than one.
    """

    objective: str | None = field(
        default=None,
        metadata={
            "help": "What is masked and scored: 'block', 'random_mask', 'semi_ar', 'ar', 'trace', or a callable. "
            "`None`: 'block' for block attention, 'random_mask' for full attention."
        },
    )
    block_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens denoised together. `None` takes the model's `config.block_size`. Full attention: tokens "
            "of a slice of `objective='semi_ar'`."
        },
    )
    loss_norm: str | None = field(
        default=None,
        metadata={
            "help": "What the loss is divided by: trained tokens of the batch ('token'), of each sequence "
            "('sequence'), masked tokens of the batch ('masked'), or the number of sequences ('batch'). `None`: "
            "'sequence' for 'random_mask' and 'semi_ar', 'masked' for `weighting='none'`, else 'token'.",
            "choices": list(LOSS_NORMS),
        },
    )
    eos_fill: bool | None = field(
        default=None,
        metadata={
            "help": "Whether documents that end are filled up with EOS tokens, which are trained: to the end of their "
            "block, or with full attention to the longest sequence of the step. `None`: yes, but for 'ar' and 'trace'."
        },
    )
    eos_fill_length: int | None = field(
        default=None,
        metadata={"help": "Full attention: documents that end are filled up with EOS to this many tokens."},
    )
    noise_per: str = field(
        default="block",
        metadata={
            "help": "With `objective='block'`: a noise level per 'block' or per 'sequence'.",
            "choices": ["block", "sequence"],
        },
    )
    noise_eps: float = field(default=1e-3, metadata={"help": "Smallest probability with which a token is masked."})
    noise_max: float = field(default=1.0, metadata={"help": "Largest probability with which a token is masked."})
    antithetic: bool = field(
        default=True,
        metadata={"help": "Whether the noise levels of a batch are spread evenly over [0, 1)."},
    )
    weighting: str = field(
        default="elbo",
        metadata={
            "help": "With `objective='random_mask'`: weight of a masked token, 1 / mask probability ('elbo'), by its "
            "distance to visible tokens ('cart'), so that a sequence's loss is a mean ('mean'), or 1 ('none').",
            "choices": list(WEIGHTINGS),
        },
    )
    cart_p: float = field(
        default=0.3, metadata={"help": "With `weighting='cart'`: parameter of the geometric distribution."}
    )
    shrink: int = field(default=1, metadata={"help": "With `objective='trace'`: steps merged into one round."})
    rounds_per_forward: int = field(
        default=1,
        metadata={"help": "Full attention: rounds of a micro-batch that go through the model at a time."},
    )

    def __new__(cls, *args, **kwargs):
        reject_renamed(kwargs)
        return super().__new__(cls)

    def __post_init__(self):
        if self.use_cpu and self.bf16 is None:
            self.bf16 = False  # TRL's default is for accelerators
        super().__post_init__()
        check_counts(self, "block_length", "eos_fill_length", "shrink", "rounds_per_forward", "max_length")
        if not 0 < self.noise_eps < 1:
            raise ValueError(f"`noise_eps` must lie between 0 and 1, but is {self.noise_eps}.")
        if not self.noise_eps <= self.noise_max <= 1:
            raise ValueError(f"`noise_max` must lie between `noise_eps` and 1, but is {self.noise_max}.")
        if not 0 < self.cart_p <= 1:
            raise ValueError(f"`cart_p` must be larger than 0 and at most 1, but is {self.cart_p}.")
        choices = {
            "loss_norm": (None, *LOSS_NORMS),
            "noise_per": ("block", "sequence"),
            "weighting": WEIGHTINGS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, but is {getattr(self, name)!r}.")
        if self.eos_fill is False and self.eos_fill_length is not None:
            raise ValueError("`eos_fill_length` says how far to fill, but `eos_fill=False`. Leave one of them out.")
        alpha = self.neftune_noise_alpha
        if alpha is not None and not 0 <= alpha < math.inf:
            raise ValueError(f"`neftune_noise_alpha` must be 0 or more, but is {alpha}. Leave it unset for no noise.")
        if self.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` is not supported: log-probabilities are computed without full logits. Set "
                "it to 0."
            )

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if callable(self.objective):  # goes to JSON
            output["objective"] = getattr(self.objective, "__name__", type(self.objective).__name__)
        return output
