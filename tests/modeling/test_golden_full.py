"""Dream, LLaDA and MMaDA against the numbers of their public code, in every attention implementation."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

import dllm_trl  # noqa: F401


FAMILIES = ["dream", "llada", "mmada"]
IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]


pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request, golden_dir):
    return golden_dir / request.param, load_file(golden_dir / request.param / "golden.safetensors")


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def loaded(request, golden):
    folder, tensors = golden
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=request.param).eval(), tensors


def check(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_everybody_sees_everybody(loaded):
    model, golden = loaded
    ids, expected = golden["input_ids"], golden["full.logits"]
    everything = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    for mask in (None, torch.ones_like(ids), everything, everything.long(), {"full_attention": everything}):
        check(model(ids, mask).logits, expected)
    check(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)
    if model.config.logit_shift:
        check(torch.cat([expected[:, :1], expected[:, :-1]], 1), golden["full.logits_shifted"])


@torch.no_grad()
def test_padding_is_invisible(loaded):
    """The public code hides pad keys (LLaDA) or pads altogether (Dream); real rows are the same number."""
    model, golden = loaded
    real = golden["left_pad.attention_mask"].bool()
    actual = model(golden["left_pad.input_ids"], golden["left_pad.attention_mask"]).logits
    check(actual[real], golden["left_pad.logits"][real])
    if "left_pad_causal_bug.logits" in golden:  # old copies turn causal as soon as the mask holds a 0
        assert (actual - golden["left_pad_causal_bug.logits"])[real].abs().max() > 1


@torch.no_grad()
def test_given_positions(loaded):
    model, golden = loaded
    if "offset_positions.logits" not in golden:
        pytest.skip("the public LLaDA code takes no positions")
    actual = model(golden["input_ids"], position_ids=golden["offset_positions.position_ids"]).logits
    check(actual, golden["offset_positions.logits"])


@torch.no_grad()
def test_other_masks(loaded):
    model, golden = loaded
    ids = golden["input_ids"]
    if "block_causal_4.mask" in golden:
        check(model(ids, golden["block_causal_4.mask"].bool()).logits, golden["block_causal_4.logits"])
    if "causal.logits" in golden:
        check(model(ids, torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()).logits, golden["causal.logits"])
        check(model(ids, is_causal=True).logits, golden["causal.logits"])
        check(model(ids, torch.ones_like(ids), is_causal=True).logits, golden["causal.logits"])


@torch.no_grad()
def test_stale_keys(loaded):
    """Fast-dLLM's prefix cache: positions 8..23 over the keys of an earlier canvas at 0..7."""
    model, golden = loaded
    if "fast.prefix_logits" not in golden:
        pytest.skip("pinned for LLaDA and MMaDA")
    cache = DynamicCache(config=model.config)
    check(model(golden["fast.input_ids"], past_key_values=cache, use_cache=True).logits, golden["fast.full_logits"])
    cache.crop(-16)
    actual = model(golden["fast.edited_ids"][:, 8:], past_key_values=cache, use_cache=True).logits
    check(actual, golden["fast.prefix_logits"])


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(loaded):
    model, golden = loaded
    ids = golden["input_ids"][:1]
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    packed = model(ids, position_ids=positions).logits
    check(packed, torch.cat([model(ids[:, :10]).logits, model(ids[:, 10:]).logits], 1))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(golden_dir, family):
    """The weights are exact in bfloat16, so the difference is that of the arithmetic: documented in docs/models.md."""
    golden = load_file(golden_dir / family / "golden.safetensors")
    model = AutoModelForCausalLM.from_pretrained(golden_dir / family, dtype=torch.bfloat16).eval()
    difference = (model(golden["input_ids"]).logits.float() - golden["full.logits"]).abs()
    assert difference.mean() < 0.12 and difference.max() < 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["llada", "mmada"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_llada_rotates_in_float32(golden_dir, family, implementation):
    """At far positions the angle in bfloat16 is off by whole radians."""
    model = AutoModelForCausalLM.from_pretrained(golden_dir / family, attn_implementation=implementation).eval()
    ids = torch.arange(100, 124)[None] - 100
    near, far = torch.arange(24)[None], torch.arange(24)[None] + 230
    half = AutoModelForCausalLM.from_pretrained(
        golden_dir / family, dtype=torch.bfloat16, attn_implementation=implementation
    ).eval()
    exact = model(ids, position_ids=near).logits
    off = [(half(ids, position_ids=p).logits.float() - exact).abs().mean() for p in (near, far)]
    assert off[1] < 1.2 * off[0]
