"""SDAR and SDAR-MoE against the numbers of their public code, in every attention implementation."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

import dllm_trl  # noqa: F401


FAMILIES = ["sdar", "sdar_moe"]
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
def test_masks_given_as_booleans(loaded):
    model, golden = loaded
    positions, everything = golden["position_ids"], torch.ones(1, 1, 24, 24, dtype=torch.bool)
    masks = {
        "full": everything,
        "block_causal_4": golden["block_causal_4.mask"].bool(),
        "block_causal_8": golden["block_causal_8.mask"].bool(),
    }
    for name, mask in masks.items():
        for form in (mask, mask.long(), mask.expand(2, -1, -1, -1), mask.expand(2, 4, -1, -1)):
            check(model(golden["noisy_ids"], form, positions).logits, golden[f"{name}.logits"])
        check(model(golden["noisy_ids"], {"full_attention": mask}, positions).logits, golden[f"{name}.logits"])
    check(model(golden["input_ids"], everything.tril()).logits, golden["causal.logits"])


@torch.no_grad()
@pytest.mark.parametrize("block_length", [4, 8])
def test_training_layout(loaded, block_length):
    model, golden = loaded
    case = {
        key: golden[f"bd_training_{block_length}.{key}"] for key in ("input_ids", "position_ids", "mask", "logits")
    }
    check(model(case["input_ids"], case["mask"].bool(), case["position_ids"]).logits, case["logits"])


@torch.no_grad()
def test_own_attention(loaded):
    model, golden = loaded
    ids, expected = golden["noisy_ids"], golden["block_causal_4.logits"]
    check(model(ids).logits, expected)
    check(model(ids, torch.ones_like(ids)).logits, expected)
    check(model(ids, block_length=8).logits, golden["block_causal_8.logits"])
    check(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)
    assert model.config.block_size == 4


@torch.no_grad()
def test_left_padding(loaded):
    model, golden = loaded
    ids, mask = golden["left_pad.input_ids"], golden["left_pad.attention_mask"]
    real = mask.bool()
    for arguments in ({}, {"position_ids": golden["left_pad.position_ids"]}):
        logits = model(ids, mask, **arguments).logits
        check(logits[real], golden["left_pad.logits"][real])
        assert logits.isfinite().all()
    # What lies under the padding does not matter.
    check(model(ids.masked_fill(~real, 7), mask).logits[real], golden["left_pad.logits"][real])


@torch.no_grad()
@pytest.mark.parametrize("with_mask", [False, True])
def test_cache(loaded, with_mask):
    model, golden = loaded
    cache, lengths = DynamicCache(config=model.config), []

    def forward(ids):
        mask = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.long) if with_mask else None
        return model(ids, mask, past_key_values=cache, use_cache=True).logits

    forward(golden["cache.prefill_ids"])
    lengths.append(cache.get_seq_length())
    for i, committed in enumerate([False, False, True, False]):
        check(forward(golden[f"cache.canvas_{i}"]), golden[f"cache.logits_{i}"])
        if not committed:
            cache.crop(-4)
        lengths.append(cache.get_seq_length())
    assert lengths == golden["cache.seq_lengths"].tolist()


@torch.no_grad()
def test_cache_with_left_padding(loaded):
    model, golden = loaded
    ids, mask = golden["left_pad.input_ids"], golden["left_pad.attention_mask"]
    cache, start = DynamicCache(config=model.config), 17  # for row 1 (5 pads) token 12, where a block begins
    model(ids[:, :start], mask[:, :start], past_key_values=cache, use_cache=True)
    logits = model(ids[1:, start:], mask[1:], past_key_values=select_row(cache, 1), use_cache=True).logits
    check(logits, golden["left_pad.logits"][1:, start:])


def select_row(cache, row):
    selected = DynamicCache()
    for i, layer in enumerate(cache.layers):
        selected.update(layer.keys[row : row + 1], layer.values[row : row + 1], i)
    return selected


@torch.no_grad()
def test_bfloat16(golden):
    folder, tensors = golden
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    logits, expected = model(tensors["noisy_ids"]).logits.float(), tensors["block_causal_4.logits"]
    # Logits have a standard deviation of about 7.5 and bfloat16 has 8 bits.
    torch.testing.assert_close(logits, expected, atol=0.75, rtol=0)
    assert (logits - expected).abs().mean() < 0.1


def test_comparison_notices_one_wrong_number(golden):
    folder, tensors = golden
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = tensors["full.logits"].clone()
    expected[1, 17, 33] += 1e-3
    with torch.no_grad(), pytest.raises(AssertionError):
        check(model(tensors["noisy_ids"], torch.ones(1, 1, 24, 24, dtype=torch.bool)).logits, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])  # FlexAttention has no backward pass on CPU
def test_training_loss_and_gradients(golden_dir, implementation):
    model = AutoModelForCausalLM.from_pretrained(golden_dir / "sdar", attn_implementation=implementation)
    golden = load_file(golden_dir / "sdar" / "golden_train.safetensors")
    logits = model(golden["model_input_ids"], golden["model_mask"].bool(), golden["model_position_ids"]).logits

    # Per sample of a packed row the model sees [x_t ; x_0]: its noisy half begins at twice the sample's offset.
    noisy = []
    for row in range(2):
        lengths = golden[f"row{row}.sample_lengths"].tolist()
        offsets = [2 * sum(lengths[:i]) + j for i, length in enumerate(lengths) for j in range(length)]
        noisy.append(logits[row, offsets])
    masked = golden["masked_indices"].bool()
    masked_logits = torch.stack(noisy)[masked]
    check(masked_logits, golden["masked_logits"])

    nll = torch.nn.functional.cross_entropy(masked_logits, golden["masked_targets"], reduction="none")
    check(nll, golden["per_token_loss"] * golden["p_mask"])
    loss = (nll / golden["p_mask"]).sum() / (golden["labels"] != -100).sum()
    check(loss, golden["loss"][0])
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = [key.removeprefix("grad.") for key in golden if key.startswith("grad.")]
    assert len(compared) == 6
    for name in compared:
        check(gradients[name], golden[f"grad.{name}"])
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    torch.testing.assert_close(norm, golden["grad_norm"][0], atol=0, rtol=1e-5)
