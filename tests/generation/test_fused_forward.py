"""The fused decode forward computes what the model's own modules compute, and stands back where it would not."""

import gc

import pytest
import torch
from torch import nn

from dllm_trl.generation.cache import SlotCache
from dllm_trl.generation.forward import Span, StockForward, Units, make_forward
from dllm_trl.generation.fused_forward import FusedForward
from tests.trainers.tiny_rl import make_model

from .conftest import MASK, tiny_model


def units(generator):
    """Three rows in flight, one of which commits its finished block in the same forward."""
    starts = torch.tensor([8, 4, 12, 8])
    ids = torch.randint(1, MASK, (4, 4), generator=generator)
    ids[:3, 2:] = MASK
    return Units(
        ids=ids,
        positions=starts[:, None] + torch.arange(4),
        slots=torch.tensor([0, 1, 2, 2]),
        visible=torch.tensor([12, 7, 16, 12]),  # row 1's block is shortened
        rows=3,
        length=16,
        read=torch.tensor([2, 3, 6, 10, 11]),
        spans=[Span(0, 2, 12, True, 0), Span(2, 3, 16, False, 2), Span(3, 4, 12, False, None)],
    )


DENSE = [
    ("sdar", {}),
    ("sdar", {"attention_bias": True}),
    ("sdar", {"head_dim": 16}),
    ("sdar", {"num_key_value_heads": 1}),
    ("Fast_dLLM_Qwen", {}),
    ("DreamForCausalLM", {}),
]


@pytest.mark.parametrize(
    "family, sizes, dtype, tolerance",
    [
        *((*case, torch.float32, 1e-5) for case in [*DENSE, ("sdar_moe", {})]),
        *((*case, torch.bfloat16, 0.15) for case in DENSE),  # half precision sends tokens to other experts
    ],
)
def test_logits_and_cache_equal_the_stock_modules(family, sizes, dtype, tolerance):
    model = tiny_model(family, **sizes).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    prompts = [torch.randint(1, MASK, (n,), generator=generator) for n in (8, 4, 8)]
    batch, results = units(generator), []
    for forward in (FusedForward(model), StockForward(model)):
        forward.reserve(20)
        cache = SlotCache(model.config, 3, 20, dtype, torch.device("cpu"))
        with torch.no_grad():
            for slot, prefix in enumerate(forward.prefill(prompts, 4)):
                cache.load(slot, prefix)
            results.append((forward.step(batch, cache).float(), cache))
    (fused, fused_cache), (stock, stock_cache) = results
    scale = stock.abs().max()
    torch.testing.assert_close(fused / scale, stock / scale, atol=tolerance, rtol=0)
    for a, b in zip(fused_cache.keys + fused_cache.values, stock_cache.keys + stock_cache.values, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=max(tolerance * b.abs().max().item(), 1e-5), rtol=0)


@pytest.mark.parametrize("kind", ["whole", "refresh", "block"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("family", ["Dream", "llada", "mmada"])
def test_full_attention_equals_the_stock_modules(family, dtype, tolerance, kind):
    """Whole rows without a cache and into one, and blocks in the middle of old keys; biases and float32 rotation."""
    model = make_model(family).eval().to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    starts = torch.tensor([0, 0] if kind != "block" else [90, 60])
    width = 4 if kind == "block" else 100
    carried = None if kind == "block" else torch.tensor([[92, 93, 94], [160, 161, 162]])
    batch = Units(
        ids=torch.randint(6, 50, (2, width), generator=generator),
        positions=starts[:, None] + torch.arange(width),
        slots=torch.tensor([0, 2]),
        visible=torch.tensor([100, 70]),
        rows=2,
        length=100,
        read=torch.tensor([0, 2, 4]),
        spans=[Span(0, 2, 100, True, None)],
        carried=carried,
    )
    old = [torch.randn(3, model.config.num_key_value_heads, 101, 8, generator=generator).to(dtype) for _ in range(4)]
    results = []
    for forward in (make_forward(model, fused=True), StockForward(model)):
        forward.reserve(101)
        cache = SlotCache(model.config, 3, 101, dtype, torch.device("cpu"))
        for stored, values in zip(cache.keys + cache.values, old, strict=True):
            stored.copy_(values)
        with torch.no_grad():
            results.append((forward.step(batch, None if kind == "whole" else cache).float(), cache))
    (fused, fused_cache), (stock, stock_cache) = results
    assert fused.shape == (3, model.config.vocab_size)
    scale = stock.abs().max()
    torch.testing.assert_close(fused / scale, stock / scale, atol=tolerance, rtol=0)
    for a, b in zip(fused_cache.keys + fused_cache.values, stock_cache.keys + stock_cache.values, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=max(tolerance * b.abs().max().item(), 1e-5), rtol=0)


def test_lladas_positions_are_rotated_in_float32():
    """In bfloat16 the tables keep float32, without which a far position is off by more than the type's rounding."""
    model = make_model("llada").to(torch.bfloat16)
    forward = make_forward(model, fused=True)
    forward.reserve(101)
    assert forward.cos.dtype == torch.float32
    other = make_forward(make_model("Dream").to(torch.bfloat16), fused=True)
    other.reserve(101)
    assert other.cos.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.neg_(),
        lambda p: p[[0, 5]].copy_(p[[5, 0]]),
        lambda p: p.index_copy_(0, torch.tensor([0, 5]), p[[5, 0]].clone()),
        lambda p: p[3, 3].add_(1e-3),
        lambda p: p.zero_(),
    ],
)
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_weights_changed_after_a_call_are_used_by_the_next(name, change):
    """Packed weights are kept between calls as long as they are the model's, however those were changed."""
    model = tiny_model()
    first = make_forward(model)
    assert make_forward(model) is first
    before = model.get_parameter(name).detach().clone()
    change(model.get_parameter(name).data)  # through .data: no version counter notices
    changed = not torch.equal(before, model.get_parameter(name))
    assert (make_forward(model) is not first) == changed
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)
    assert make_forward(model) is not first


def test_kept_weights_go_with_their_model():
    from dllm_trl.generation.forward import _READY

    model = tiny_model()
    make_forward(model)
    assert model in _READY
    count = len(_READY)
    del model
    gc.collect()
    assert len(_READY) < count


def test_what_it_does_not_cover_takes_the_stock_path():
    assert isinstance(make_forward(tiny_model()), FusedForward)

    hooked = tiny_model()
    hooked.model.layers[0].register_forward_hook(lambda module, args, output: output)
    assert isinstance(make_forward(hooked), StockForward)

    swapped = tiny_model()
    swapped.model.layers[1].mlp.up_proj = nn.Sequential(swapped.model.layers[1].mlp.up_proj)
    assert isinstance(make_forward(swapped), StockForward)

    mixed = tiny_model()
    mixed.lm_head.to(torch.bfloat16)
    assert isinstance(make_forward(mixed), StockForward)
    with pytest.raises(ValueError, match="fused"):
        make_forward(mixed, fused=True)

    class Attention(type(tiny_model().model.layers[0].self_attn)):
        pass

    changed = tiny_model()
    changed.model.layers[0].self_attn.__class__ = Attention
    assert isinstance(make_forward(changed), StockForward)


def test_lora_takes_the_stock_path_and_counts():
    peft = pytest.importorskip("peft")
    from dllm_trl.generation import generate_rollouts

    base = generate_rollouts(tiny_model(), [[1, 2, 3, 4, 5]], max_new_tokens=8)
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    assert isinstance(make_forward(model.get_base_model()), StockForward)
    fresh = generate_rollouts(model, [[1, 2, 3, 4, 5]], max_new_tokens=8)
    assert torch.equal(fresh.canvas_ids, base.canvas_ids)  # LoRA starts as the identity
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    trained = generate_rollouts(model, [[1, 2, 3, 4, 5]], max_new_tokens=8)
    assert not torch.equal(trained.logprobs, base.logprobs)
    output = model.generate(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), max_new_tokens=8)
    assert output[0, 5:].tolist() == trained.canvas_ids[0].tolist()


def test_autocast_takes_the_stock_path(sdar):
    """Under autocast the modules decide which operation runs in which type, for the trainer and so for the rollout."""
    from dllm_trl.generation import generate_rollouts

    prompt = [5, 9, 2, 7, 11, 3]
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(make_forward(sdar), StockForward)
        rollout = generate_rollouts(sdar, [prompt], max_new_tokens=2)
        canvas = torch.tensor([prompt + [MASK] * 2])
        with torch.no_grad():
            log_probs = sdar(canvas).logits[0, 6:].float().log_softmax(-1)
    first = rollout.step_map[0] == 0
    expected = log_probs[first].gather(-1, rollout.canvas_ids[0, first][:, None])[:, 0]
    torch.testing.assert_close(rollout.logprobs[0, first], expected, atol=2e-2, rtol=0)
    assert isinstance(make_forward(sdar), FusedForward)
