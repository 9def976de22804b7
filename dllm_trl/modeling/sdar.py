"""SDAR and TraDo: Qwen3 and Qwen3-MoE with attention inside the block, logits in place. Weight names are Qwen3's."""

from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel

from dllm_trl._compat import register_weight_names
from dllm_trl.modeling.base import (
    DiffusionBackboneMixin,
    DiffusionCausalLMMixin,
    DiffusionConfigMixin,
    register_family,
)


class SDARConfig(DiffusionConfigMixin, Qwen3Config):
    model_type = "sdar"

    # The published config.json has neither; the -b8, -b16, ... variants say their block size only in their name.
    block_size: int = 4
    mask_token_id: int | None = 151669


class SDARMoeConfig(DiffusionConfigMixin, Qwen3MoeConfig):
    model_type = "sdar_moe"

    block_size: int = 4
    mask_token_id: int | None = 151669


class SDARModel(DiffusionBackboneMixin, Qwen3Model):
    config: SDARConfig


class SDARForCausalLM(DiffusionCausalLMMixin, Qwen3ForCausalLM):
    config: SDARConfig
    backbone_class = SDARModel


class SDARMoeModel(DiffusionBackboneMixin, Qwen3MoeModel):
    config: SDARMoeConfig


class SDARMoeForCausalLM(DiffusionCausalLMMixin, Qwen3MoeForCausalLM):
    config: SDARMoeConfig
    backbone_class = SDARMoeModel


register_weight_names("sdar_moe", {}, like="qwen3_moe")  # one tensor per expert on disk, stacked in memory
register_family(SDARConfig, SDARModel, SDARForCausalLM)
register_family(SDARMoeConfig, SDARMoeModel, SDARMoeForCausalLM)
