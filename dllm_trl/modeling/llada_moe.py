"""LLaDA-MoE: Qwen3-MoE with full attention, logits in place, under Qwen3-MoE's weight names but not its config's."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel

from dllm_trl._compat import register_weight_names
from dllm_trl.modeling.base import (
    DiffusionBackboneMixin,
    DiffusionCausalLMMixin,
    DiffusionConfigMixin,
    register_family,
)


# Of what its code can build, the published checkpoints use this, and Qwen3-MoE computes nothing else.
ONLY = {"qk_layernorm": True, "moe_router_score_function": "softmax", "partial_rotary_factor": 1}
ONLY |= dict.fromkeys(["clip_qkv", "shared_expert_intermediate_size"]) | {"moe_router_enable_expert_bias": False}


@strict
class LLaDAMoEConfig(DiffusionConfigMixin, Qwen3MoeConfig):
    model_type = "llada"
    diffusion_attention = "full"
    generation_defaults = {"remasking_strategy": "low_confidence_static"}
    attribute_map = {
        **Qwen3MoeConfig.attribute_map,
        "dense_intermediate_size": "intermediate_size",
        "expert_intermediate_size": "moe_intermediate_size",
    }

    mask_token_id: int | None = 156895
    pad_token_id: int | None = 156892
    eos_token_id: int | list[int] | None = 156892
    norm_topk_prob: bool | None = None
    router_aux_loss_coef: float = 0.01
    moe_layer_freq: list[int] | None = None  # 0: a dense layer

    def __post_init__(self, **kwargs):
        if self.moe_layer_freq is not None:
            self.mlp_only_layers = [i for i, sparse in enumerate(self.moe_layer_freq) if not sparse]
        super().__post_init__(**kwargs)
        values = {**vars(self), **self.rope_parameters}
        for name, only in ONLY.items():
            if values.get(name, only) != only:
                raise ValueError(f"`{name}={values[name]!r}` is not supported: only {only!r} is published.")


class LLaDAMoEBackbone(DiffusionBackboneMixin, Qwen3MoeModel):
    config: LLaDAMoEConfig

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            if i not in config.mlp_only_layers:
                layer.mlp.gate.norm_topk_prob = False  # whatever the config says, in the public code


class LLaDAMoEModelLM(DiffusionCausalLMMixin, Qwen3MoeForCausalLM):
    config: LLaDAMoEConfig
    backbone_class = LLaDAMoEBackbone


# By class: the model type belongs to LLaDA, whose names are others.
register_weight_names("LLaDAMoEModelLM", {}, like="qwen3_moe")
register_weight_names("LLaDAMoEBackbone", {})
register_family(LLaDAMoEConfig, LLaDAMoEModelLM, LLaDAMoEModelLM)
