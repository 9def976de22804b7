"""LLaDA2.x: GLM-4-MoE (grouped sigmoid routing, shared experts, partial rotation) with attention inside the block."""

from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeConfig, Glm4MoeForCausalLM, Glm4MoeModel

from dllm_trl._compat import register_weight_names
from dllm_trl.modeling.base import (
    DiffusionBackboneMixin,
    DiffusionCausalLMMixin,
    DiffusionConfigMixin,
    register_family,
)


# Of what its code can build, the published checkpoints use this, and GLM-4-MoE computes nothing else.
ONLY = {"score_function": "sigmoid", "norm_topk_prob": True, "norm_head": False, "use_bias": False}
WEIGHT_NAMES = {
    r"model\.word_embeddings\.": "model.embed_tokens.",
    r"\.attention\.dense\.": ".self_attn.o_proj.",
    r"\.attention\.query_layernorm\.": ".self_attn.q_norm.",
    r"\.attention\.key_layernorm\.": ".self_attn.k_norm.",
    r"\.attention\.query_key_value\.": ".self_attn.query_key_value.",
    r"\.gate\.expert_bias": ".gate.e_score_correction_bias",
}


class LLaDA2MoeConfig(DiffusionConfigMixin, Glm4MoeConfig):
    model_type = "llada2_moe"
    attribute_map = {
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "use_qkv_bias": "attention_bias",
    }

    block_size: int = 32
    mask_token_id: int | None = 156895
    pad_token_id: int | None = 156892
    eos_token_id: int | list[int] | None = 156892
    use_qk_norm: bool = True
    num_local_experts = property(lambda self: self.n_routed_experts)

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, only in ONLY.items():
            if getattr(self, name, only) != only:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is not supported: only {only!r} is published.")


class LLaDA2MoeModel(DiffusionBackboneMixin, Glm4MoeModel):
    config: LLaDA2MoeConfig
    _keys_to_ignore_on_load_unexpected = None


class LLaDA2MoeModelLM(DiffusionCausalLMMixin, Glm4MoeForCausalLM):
    config: LLaDA2MoeConfig
    backbone_class = LLaDA2MoeModel
    _keys_to_ignore_on_load_unexpected = None


register_weight_names(
    "llada2_moe",
    WEIGHT_NAMES,
    like="glm4_moe",  # one tensor per expert on disk, stacked in memory
    split={"query_key_value": ["q_proj", "k_proj", "v_proj"]},
)
register_family(LLaDA2MoeConfig, LLaDA2MoeModel, LLaDA2MoeModelLM)
