"""Where the numbers of the public implementations lie. Point the variables at other copies to test against those."""

import json
import os
from pathlib import Path

import pytest


FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = ["sdar", "sdar_moe", "dream", "llada", "mmada", "fast_dllm", "llada_moe", "llada2"]
PUBLISHED = [*GOLDEN, "dream_reasoner"]


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Tiny checkpoints in the published formats, with what the public code computes on them."""
    return Path(os.environ.get("DLLM_TRL_GOLDEN", FIXTURES / "golden"))


@pytest.fixture(scope="session")
def oracles_dir() -> Path:
    """Inputs and expected outputs of every objective."""
    return Path(os.environ.get("DLLM_TRL_ORACLES", FIXTURES / "oracles"))


@pytest.fixture(scope="session")
def tokenizers_dir() -> Path:
    """Published tokenizer folders; the ones in the repository lack the large vocabulary files."""
    return Path(os.environ.get("DLLM_TRL_TOKENIZERS", FIXTURES / "tokenizers"))


@pytest.fixture(scope="session")
def published_folder(golden_dir, tmp_path_factory):
    """Name -> published folder: the golden ones, and one for the family whose public code cannot be run here."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    dream_reasoner = tmp_path_factory.mktemp("published") / "dream_reasoner"
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    stock = Qwen3Config(**sizes, rope_parameters=rope, tie_word_embeddings=False, initializer_range=0.25)
    Qwen3ForCausalLM(stock).save_pretrained(dream_reasoner)
    auto_map = {"AutoConfig": "configuration_dream.DreamConfig"}
    auto_map |= {"AutoModelForCausalLM": "modeling_dream.DreamForCausalLM"}
    config = {**sizes, "architectures": ["DreamForCausalLM"], "auto_map": auto_map, "model_type": "Dream"}
    config |= {"block_size": 32, "mask_token_id": 126, "eos_token_id": 125, "pad_token_id": 125, "hidden_act": "silu"}
    config |= {"attention_bias": False, "rope_theta": 1000000.0, "rope_scaling": None, "tie_word_embeddings": False}
    config |= {"rms_norm_eps": 1e-6, "torch_dtype": "float32", "transformers_version": "4.55.0"}
    (dream_reasoner / "config.json").write_text(json.dumps(config))
    return lambda name: dream_reasoner if name == "dream_reasoner" else golden_dir / name


@pytest.fixture
def uncompiled():
    """transformers compiles FlexAttention, which PyTorch's CPU backend cannot do for every mask. Run it as written."""
    import torch

    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
