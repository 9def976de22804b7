"""What LLaDA and MMaDA share: Llama with full attention under LLaDA's names, rotated in float32. No family itself."""

from typing import Any

from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.configuration_llama import LlamaConfig

from dllm_trl.modeling import base
from dllm_trl.modeling.rotary import Float32RotaryMixin, rotating_in_float32


# Of what LLaDA's code can build, the published checkpoints use this, and Llama computes nothing else.
ONLY = {"block_type": "llama", "layer_norm_type": "rms", "rope": True, "alibi": False, "include_bias": False}
ONLY |= {"scale_logits": False, "input_emb_norm": False, "attention_layer_norm": False, "bias_for_layer_norm": False}
NAMES = {"attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "attn_out": "self_attn.o_proj"}
NAMES |= {"ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj"}
NAMES |= {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")}
WEIGHT_NAMES = {
    **{rf"model\.transformer\.blocks\.(\d+)\.{name}\.": rf"model.layers.\1.{ours}." for name, ours in NAMES.items()},
    r"model\.transformer\.wte\.": "model.embed_tokens.",
    r"model\.transformer\.ln_f\.": "model.norm.",
    r"model\.transformer\.ff_out\.": "lm_head.",
}


class LLaDALikeConfig(base.DiffusionConfigMixin, LlamaConfig):
    diffusion_attention = "full"
    generation_defaults = {"remasking_strategy": "low_confidence_static"}
    attribute_map = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
        "activation_type": "hidden_act",
        "include_qkv_bias": "attention_bias",
        "init_std": "initializer_range",
        "weight_tying": "tie_word_embeddings",
        "embedding_size": "vocab_size",  # the public code builds the embedding with it
    }

    mask_token_id: int | None = 126336
    pad_token_id: int | None = 126081
    bos_token_id: int | None = None  # config.json names none; the tokenizer has it
    eos_token_id: int | list[int] | None = 126081

    def __post_init__(self, **kwargs):
        for name, only in ONLY.items():
            if kwargs.get(name, only) != only:
                raise ValueError(f"`{name}={kwargs[name]!r}` is not supported: only {only!r} is published.")
        if kwargs.get("embedding_size") not in (None, self.vocab_size):
            raise ValueError(
                f"`embedding_size={kwargs['embedding_size']}` and `vocab_size={self.vocab_size}` are two names of one "
                "size: the rows of the embedding. Write the same number under both into config.json."
            )
        aliases = {name for name, stored in self.attribute_map.items() if stored == "vocab_size"}
        super().__post_init__(**{key: value for key, value in kwargs.items() if key not in aliases})

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"vocab_size": self.vocab_size}  # published under this name, too


class LLaDARotaryEmbedding(Float32RotaryMixin, llama.LlamaRotaryEmbedding):
    pass


class LLaDAAttention(llama.LlamaAttention):
    forward = rotating_in_float32(llama.LlamaAttention)


class LLaDABackbone(base.DiffusionBackboneMixin, llama.LlamaModel):
    config: LLaDALikeConfig

    def __init__(self, config: LLaDALikeConfig):
        super().__init__(config)
        self.rotary_emb = LLaDARotaryEmbedding(config)
        for i, layer in enumerate(self.layers):
            layer.self_attn = LLaDAAttention(config, i)
