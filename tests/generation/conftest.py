import pytest
import torch
from transformers import set_seed

from dllm_trl.modeling.sdar import SDARConfig, SDARForCausalLM, SDARMoeConfig, SDARMoeForCausalLM


VOCAB, MASK, PAD = 64, 63, 0


def tiny_model(moe: bool = False, **kwargs):
    """A random SDAR whose logits are wide enough that greedy decoding has no near-ties."""
    set_seed(0)
    config = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.3,
        mask_token_id=MASK,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        **kwargs,
    )
    if moe:
        moe_config = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        return SDARMoeForCausalLM(SDARMoeConfig(**config, **moe_config)).eval()
    return SDARForCausalLM(SDARConfig(**config)).eval()


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request):
    return tiny_model(moe=request.param == "moe")


@pytest.fixture(scope="module")
def dense():
    return tiny_model()


def ragged_prompts(sizes=(5, 1, 8, 11, 3), seed=0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB - 2, (n,), generator=generator).tolist() for n in sizes]


def left_pad(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}
