import pytest
import torch

from dllm_trl.generation.fused_forward import FusedForward
from tests.trainers.tiny_rl import BLOCK, make_model


VOCAB, MASK, PAD = 64, 63, 0


def tiny_model(family: str = "sdar", **kwargs):
    """A random model whose logits are wide enough that greedy decoding has no near-ties."""
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 256, "initializer_range": 0.3}
    ids = {"mask_token_id": MASK, "pad_token_id": PAD, "eos_token_id": None}
    model = make_model(family, **{**sizes, **ids, **kwargs}).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module", params=BLOCK)
def model(request):
    """Of every family with block attention."""
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def sdar():
    return tiny_model()


def forwards(model) -> list[bool]:
    """What `fused=` can be for the model: the fused decode forward, where it covers the family, and the stock one."""
    return [True, False] if FusedForward.supports(model) else [False]


def ragged_prompts(sizes=(5, 1, 8, 11, 3), seed=0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB - 2, (n,), generator=generator).tolist() for n in sizes]


def left_pad(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}
