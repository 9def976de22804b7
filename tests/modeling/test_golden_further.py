"""Fast-dLLM v2, LLaDA-MoE and LLaDA2.x against the numbers of their public code, in every attention implementation;
DreamReasoner, whose public code cannot be run here, against the stock Qwen3 that it is."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config, Qwen3ForCausalLM

import dllm_trl  # noqa: F401


BLOCKS = ["fast_dllm", "llada2"]
IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]


pytestmark = pytest.mark.usefixtures("uncompiled")


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval(), load_file(folder / "golden.safetensors")


def block_mask(length, block):
    blocks = torch.arange(length) // block
    return (blocks[:, None] >= blocks)[None, None]


def check(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", BLOCKS)
def test_own_attention_and_given_masks(golden_dir, family, implementation):
    model, golden = load(golden_dir / family, attn_implementation=implementation)
    ids = golden["input_ids"]
    check(model(ids).logits, golden["block_causal_32.logits"])
    for block in (4, 8, 32):
        check(model(ids, block_length=block).logits, golden[f"block_causal_{block}.logits"])
        check(model(ids, block_mask(48, block)).logits, golden[f"block_causal_{block}.logits"])
    expected = golden["full.logits"]
    length = expected.shape[1]
    check(model(ids[:, :length], torch.ones(1, 1, length, length, dtype=torch.bool)).logits, expected)
    # Far positions that begin a new block where the input begins: only distances matter to the rotation.
    if "offset_positions.logits" in golden:
        positions = golden["offset_positions.position_ids"]
        check(model(ids, block_mask(48, 32), positions).logits, golden["offset_positions.logits"])


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", BLOCKS)
def test_cache(golden_dir, family, implementation):
    """The public code gives the last block over a cache the same numbers as in one piece, up to rounding."""
    model, golden = load(golden_dir / family, attn_implementation=implementation)
    ids, cache = golden["input_ids"], DynamicCache(config=model.config)
    model(ids[:, :40], past_key_values=cache, use_cache=True, block_length=8)
    logits = model(ids[:, 40:], past_key_values=cache, use_cache=True, block_length=8).logits
    check(logits, golden["block_causal_8.logits"][:, 40:])
    if "cache.logits" in golden:
        check(logits, golden["cache.logits"])


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_llada_moe(golden_dir, implementation):
    model, golden = load(golden_dir / "llada_moe", attn_implementation=implementation)
    ids, mask = golden["input_ids"], golden["left_pad.attention_mask"]
    check(model(ids).logits, golden["full.logits"])
    check(model(ids, torch.ones_like(ids)).logits, golden["full.logits"])
    check(model(ids, mask).logits[mask.bool()], golden["left_pad.logits"][mask.bool()])
    positions = golden["offset_positions.position_ids"]
    check(model(ids, position_ids=positions).logits, golden["offset_positions.logits"])
    # The public code reads this key and goes its own way.
    check(load(golden_dir / "llada_moe", norm_topk_prob=True)[0](ids).logits, golden["full.logits"])


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dream_reasoner_is_qwen3_with_another_mask(published_folder, implementation):
    folder = published_folder("dream_reasoner")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval()
    fields = Qwen3Config().to_dict().keys() - {"model_type", "architectures"}
    config = Qwen3Config(**{key: value for key, value in vars(model.config).items() if key in fields})
    stock = Qwen3ForCausalLM(config).eval()
    stock.set_attn_implementation("sdpa")
    stock.load_state_dict(load_file(folder / "model.safetensors"))
    ids = torch.randint(0, 120, (2, 48), generator=torch.Generator().manual_seed(0))
    for block in (32, 8):
        expected = stock(ids, attention_mask=block_mask(48, block)).logits
        check(model(ids, block_length=None if block == 32 else block).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "family, mean, largest", [("fast_dllm", 0.25, 4), ("llada_moe", 0.25, 16), ("llada2", 0.25, 16)]
)
def test_half_precision(golden_dir, family, mean, largest):
    """The weights are exact in bfloat16, so the difference is that of the arithmetic. A token whose best experts are
    nearly tied goes to others in half precision, in the public code too."""
    model, golden = load(golden_dir / family, dtype=torch.bfloat16)
    name = "full.logits" if family == "llada_moe" else "block_causal_32.logits"
    difference = (model(golden["input_ids"]).logits.float() - golden[name]).abs()
    assert difference.mean() < mean and difference.max() < largest


@torch.no_grad()
def test_router_logits(golden_dir):
    """LLaDA-MoE's public code has a load-balancing loss, LLaDA2's has none."""
    for family, aux_loss in (("llada_moe", True), ("llada2", False)):
        model, golden = load(golden_dir / family)
        outputs = model(golden["input_ids"], output_router_logits=True)
        assert [tuple(x.shape) for x in outputs.router_logits] == [(96, 8)]  # one of the two layers has experts
        assert (outputs.aux_loss is not None) == aux_loss
