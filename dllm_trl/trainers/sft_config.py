from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from ..generation.configuration import reject_renamed


@dataclass
class DiffusionSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`DiffusionSFTTrainer`]: [`~trl.SFTConfig`] and what diffusion language models add.

    This class includes only the parameters that are specific to diffusion language models. All others keep the name,
    the meaning and the default they have in [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        objective (`str` or [`SFTObjective`], *optional*, defaults to `"block"`):
            What is masked and scored: a name from `dllm_trl.trainers.objectives.sft.SFT_OBJECTIVES`, or a callable.
        block_length (`int`, *optional*):
            Tokens denoised together. `None` takes the model's `config.block_size`.
        loss_norm (`str`, *optional*, defaults to `"token"`):
            What the weighted sum of negative log-likelihoods is divided by: `"token"`, the trained tokens of the whole
            batch; `"sequence"`, each sequence's own trained tokens, then averaged over sequences; `"batch"`, the
            number of sequences. The batch is that of an optimizer step, over all processes.
        eos_fill (`bool`, *optional*):
            Whether the block in which a document ends is filled up with EOS tokens, which are trained like the others.
            Decoding denoises whole blocks, so the model meets the positions after EOS. Documents that were cut at
            `max_length` do not end and are not filled. `None` takes the family's default: yes for block attention.
        noise_per (`str`, *optional*, defaults to `"block"`):
            With `objective="block"`: a noise level per `"block"` (BD3LM) or per `"sequence"` (as SDAR was trained).
        noise_eps (`float`, *optional*, defaults to `1e-3`):
            Smallest probability with which a token is masked.
        antithetic (`bool`, *optional*, defaults to `True`):
            Whether the noise levels of a batch are spread evenly over [0, 1) instead of drawn independently.
    """

    objective: str = field(default="block", metadata={"help": "What is masked and scored: 'block', or a callable."})
    block_length: int | None = field(
        default=None,
        metadata={"help": "Tokens denoised together. `None` takes the model's `config.block_size`."},
    )
    loss_norm: str = field(
        default="token",
        metadata={
            "help": "What the loss is divided by: trained tokens of the batch ('token'), of each sequence "
            "('sequence'), or the number of sequences ('batch').",
            "choices": ["token", "sequence", "batch"],
        },
    )
    eos_fill: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the block in which a document ends is filled up with EOS tokens, which are trained. "
            "`None`: yes for families with block attention."
        },
    )
    noise_per: str = field(
        default="block",
        metadata={
            "help": "With `objective='block'`: a noise level per 'block' or per 'sequence'.",
            "choices": ["block", "sequence"],
        },
    )
    noise_eps: float = field(default=1e-3, metadata={"help": "Smallest probability with which a token is masked."})
    antithetic: bool = field(
        default=True,
        metadata={"help": "Whether the noise levels of a batch are spread evenly over [0, 1)."},
    )

    def __new__(cls, *args, **kwargs):
        reject_renamed(kwargs)
        return super().__new__(cls)

    def __post_init__(self):
        super().__post_init__()
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"`block_length` must be at least 1, but is {self.block_length}.")
        if not 0 < self.noise_eps < 1:
            raise ValueError(f"`noise_eps` must lie between 0 and 1, but is {self.noise_eps}.")
        for name, choices in (("loss_norm", ("token", "sequence", "batch")), ("noise_per", ("block", "sequence"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, but is {getattr(self, name)!r}.")
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
