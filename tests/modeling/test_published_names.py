"""What a published config.json calls its sizes reaches the stock code under the name that it reads, and goes back."""

import pytest

import dllm_trl  # noqa: F401
from dllm_trl.modeling.llada import LLaDAConfig
from dllm_trl.modeling.mmada import MMadaConfig


VALUES = {
    "d_model": (96, "hidden_size"),
    "n_layers": (3, "num_hidden_layers"),
    "n_heads": (6, "num_attention_heads"),
    "n_kv_heads": (2, "num_key_value_heads"),
    "mlp_hidden_size": (72, "intermediate_size"),
    "max_sequence_length": (77, "max_position_embeddings"),
    "activation_type": ("gelu", "hidden_act"),
    "include_qkv_bias": (True, "attention_bias"),
    "init_std": (0.5, "initializer_range"),
    "weight_tying": (True, "tie_word_embeddings"),
}


@pytest.mark.parametrize("config_class", [LLaDAConfig, MMadaConfig])
@pytest.mark.parametrize("published", VALUES)
def test_llada(config_class, published):
    value, stock = VALUES[published]
    given = {"d_model": 96, "n_heads": 6, "vocab_size": 200_000, published: value}
    config = config_class.from_dict(given)
    assert getattr(config, stock) == value and getattr(config, published) == value
    assert config.head_dim == 16
    assert config.to_dict()[published] == value
