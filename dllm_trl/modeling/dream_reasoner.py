"""DreamReasoner: Qwen3 with attention inside blocks of 32, logits in place. Its config.json says "Dream", too."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from dllm_trl.modeling.base import (
    DiffusionBackboneMixin,
    DiffusionCausalLMMixin,
    DiffusionConfigMixin,
    register_family,
)


@strict
class DreamReasonerConfig(DiffusionConfigMixin, Qwen3Config):
    model_type = "Dream"

    block_size: int = 32
    mask_token_id: int | None = 151669
    # Published as null, and computed from the sizes
    head_dim: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads


class DreamReasonerModel(DiffusionBackboneMixin, Qwen3Model):
    config: DreamReasonerConfig


class DreamForCausalLM(DiffusionCausalLMMixin, Qwen3ForCausalLM):
    config: DreamReasonerConfig
    backbone_class = DreamReasonerModel


register_family(DreamReasonerConfig, DreamForCausalLM, DreamForCausalLM)
