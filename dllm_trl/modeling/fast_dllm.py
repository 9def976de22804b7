"""Fast-dLLM v2: Qwen2 with attention inside blocks of 32 and a shifted head. Weight names are Qwen2's."""

from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from dllm_trl.modeling.base import (
    DiffusionBackboneMixin,
    DiffusionCausalLMMixin,
    DiffusionConfigMixin,
    register_family,
)


class Fast_dLLM_QwenConfig(DiffusionConfigMixin, Qwen2Config):
    model_type = "Fast_dLLM_Qwen"
    logit_shift = 1
    attribute_map = {"bd_size": "block_size"}

    block_size: int = 32
    mask_token_id: int | None = 151665  # the published config.json does not name it


class Fast_dLLM_QwenModel(DiffusionBackboneMixin, Qwen2Model):
    config: Fast_dLLM_QwenConfig


class Fast_dLLM_QwenForCausalLM(DiffusionCausalLMMixin, Qwen2ForCausalLM):
    config: Fast_dLLM_QwenConfig
    backbone_class = Fast_dLLM_QwenModel


register_family(Fast_dLLM_QwenConfig, Fast_dLLM_QwenModel, Fast_dLLM_QwenForCausalLM)
