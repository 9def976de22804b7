"""A family's backbone with one number per position in place of logits: a critic."""

from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_outputs import TokenClassifierOutput


class TokenHeadMixin:
    """
    A backbone with a head `Linear(hidden, num_labels, bias=False)`, which begins as zero. Mixed in before the stock
    class of a family's pretrained models. What it says about token `i` of a response is read where its logits are, at
    position `i - config.logit_shift`.
    """

    backbone_class: ClassVar[type[PreTrainedModel]]
    # A policy's head, where a critic is made of a policy's checkpoint
    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.",)
    # Its changes are too small for half precision
    _keep_in_fp32_modules_strict = ("score",)

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.model = self.backbone_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.score:
            initialization.zeros_(module.weight)
        else:
            super()._init_weights(module)

    def share_weights(self) -> None:
        """Called before each forward. A critic that sees with another model's weights finds them anew here."""

    def forward(self, input_ids: torch.LongTensor | None = None, *args, **kwargs) -> TokenClassifierOutput:
        r"""
        Takes what the family's backbone takes.

        Returns:
            [`~transformers.modeling_outputs.TokenClassifierOutput`]: `logits` of shape `(B, S, num_labels)`, or of the
            `n` positions in `score_index`, `(1, n, num_labels)`.
        """
        self.share_weights()
        hidden = self.model(input_ids, *args, **kwargs).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return TokenClassifierOutput(logits=self.score(hidden.to(self.score.weight.dtype)))


def make_critic_class(
    config_class: type[PreTrainedConfig], causal_lm: type[PreTrainedModel], mixins: tuple[type, ...]
) -> type[PreTrainedModel]:
    """The critic of a family: `SDARForTokenClassification` beside `SDARForCausalLM`."""
    stock = next(base for base in causal_lm.__mro__ if PreTrainedModel in base.__bases__)
    content = {"__module__": causal_lm.__module__, "__annotations__": {"config": config_class}}
    content |= {"config_class": config_class, "backbone_class": causal_lm.backbone_class}
    name = config_class.__name__.removesuffix("Config") + "ForTokenClassification"
    return type(name, (TokenHeadMixin, *mixins, stock), content)
