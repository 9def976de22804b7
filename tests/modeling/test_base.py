"""The contract of the backbone's forward that every family shares: masks, plans, gathered hidden states, refusals."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dllm_trl  # noqa: F401
from dllm_trl.modeling.base import check_diffusion_model
from dllm_trl.types import Round
from tests.scoring.packing import pack

from ..conftest import PUBLISHED


pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture(params=PUBLISHED)
def model(request, published_folder):
    return AutoModelForCausalLM.from_pretrained(published_folder(request.param))


@pytest.fixture
def packed():
    """Two prompts of 6 and 9 tokens, 7 answer tokens each, two rounds, in blocks of 4."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 120, (2, 16), generator=generator)
    prompt_mask = torch.ones(2, 9, dtype=torch.long)
    prompt_mask[0, :3] = 0
    answer_mask = torch.ones(2, 7, dtype=torch.long)
    early = torch.rand(2, 7, generator=generator) < 0.5
    rounds = [Round(masked=torch.ones(2, 7, dtype=torch.bool), scored=early), Round(masked=~early, scored=~early)]
    return pack(ids[:, :9], prompt_mask, ids[:, 9:], answer_mask, rounds, block_length=4, mask_token_id=126)


def run(model, packed, **arguments):
    return model(packed.input_ids, position_ids=packed.position_ids, plan=packed.plan, **arguments)


def check(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_plan_means_its_dense_mask(model, packed, implementation):
    with torch.no_grad():
        expected = model(packed.input_ids, packed.plan.dense(), packed.position_ids).logits
        model.set_attn_implementation(implementation)
        check(run(model, packed).logits, expected)


def test_plan_replaces_every_other_mask(model, packed):
    with torch.no_grad():
        mask = torch.zeros_like(packed.input_ids)
        check(run(model, packed, attention_mask=mask).logits, run(model, packed).logits, atol=0)


def test_plan_gradients_with_and_without_checkpointing(model, packed):
    def gradients(**arguments):
        model.zero_grad()
        logits = model(packed.input_ids, position_ids=packed.position_ids, **arguments).logits
        logits.gather(-1, packed.labels.new_zeros(*logits.shape[:2], 1)).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model.train()
    expected = gradients(attention_mask=packed.plan.dense())
    planned = gradients(plan=packed.plan)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layer, calls = model.model.layers[0].self_attn, []
    layer.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients(plan=packed.plan)
    assert len(calls) == 2  # the forward pass and its recomputation
    for a, b, c in zip(expected, planned, checkpointed, strict=True):
        scale = a.abs().max() + 1
        check(b / scale, a / scale, atol=1e-5)
        check(c / scale, b / scale, atol=1e-6)


def test_score_index_gathers_before_the_head(model, packed):
    with torch.no_grad():
        full = run(model, packed, output_hidden_states=True)
        scored = run(model, packed, score_index=packed.score_index, output_hidden_states=True)
    count = len(packed.score_index)
    assert scored.logits.shape == (1, count, model.config.vocab_size)
    check(scored.logits[0], full.logits[0, packed.score_index], atol=1e-5)
    assert scored.hidden_states[-1].shape == full.hidden_states[-1].shape

    # The index runs over the flattened batch.
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        gathered = model.model(ids, score_index=torch.tensor([23, 0, 12])).last_hidden_state
    assert torch.equal(gathered, hidden[[1, 0, 1], [11, 0, 0]][None])


@pytest.mark.parametrize("family, sparse_layers", [("sdar_moe", 2), ("llada_moe", 1), ("llada2", 1)])
def test_router_logits(golden_dir, packed, family, sparse_layers):
    model = AutoModelForCausalLM.from_pretrained(golden_dir / family)
    backbone = model.model(
        packed.input_ids,
        position_ids=packed.position_ids,
        plan=packed.plan,
        score_index=packed.score_index,
        output_router_logits=True,
    )
    assert backbone.last_hidden_state.shape[1] == len(packed.score_index)
    assert [tuple(x.shape) for x in backbone.router_logits] == sparse_layers * [(packed.input_ids.shape[1], 8)]
    outputs = run(model, packed, score_index=packed.score_index, output_router_logits=True)
    if family == "llada2":  # whose public code has none
        assert outputs.aux_loss is None
    else:
        assert outputs.aux_loss > 0


def test_packed_sequences_do_not_see_each_other(model):
    ids = torch.randint(0, 120, (1, 19), generator=torch.Generator().manual_seed(1))
    lengths = [7, 2, 10]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        logits = model(ids, position_ids=positions).logits
        alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    check(logits, alone)


def test_padding_anywhere(model):
    ids = torch.randint(0, 120, (1, 13), generator=torch.Generator().manual_seed(2))
    padded, mask = torch.full((1, 18), 124), torch.zeros(1, 18, dtype=torch.long)
    places = [0, 1, 3, 4, 5, 6, 8, 10, 11, 12, 14, 15, 16]
    padded[:, places], mask[:, places] = ids, 1
    with torch.no_grad():
        check(model(padded, mask).logits[:, places], model(ids).logits)


@pytest.mark.parametrize("mask", ["none", "2D", "4D", "plan"])
def test_flash_attention_is_refused(model, packed, mask):
    if model.config.diffusion_attention == "full" and mask in ("none", "2D"):
        pytest.skip("flash attention does these")
    model.config._attn_implementation = "flash_attention_2"
    ids = packed.input_ids
    arguments = {
        "none": {},
        "2D": {"attention_mask": torch.ones_like(ids)},
        "4D": {"attention_mask": torch.ones(1, 1, *2 * ids.shape[1:], dtype=torch.bool), "is_causal": False},
        "plan": {"plan": packed.plan, "is_causal": False},
    }
    with pytest.raises(ValueError, match='`attn_implementation="flash_attention_2"`.*attn_implementation="sdpa"'):
        model(ids, position_ids=packed.position_ids, **arguments[mask])


@torch.no_grad()
def test_flash_attention_takes_a_canvas_over_the_cache(model, monkeypatch):
    def flash(module, query, key, value, attention_mask, *, is_causal, **kwargs):
        assert attention_mask is None and not is_causal
        return sdpa_attention_forward(module, query, key, value, None, is_causal=is_causal, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    ids, logits = torch.randint(0, 120, (2, 12), generator=torch.Generator().manual_seed(3)), []
    for implementation in ("sdpa_plan", "flash_attention_2"):
        model.config._attn_implementation = "sdpa_plan"
        cache = DynamicCache(config=model.config)
        model(ids[:, :8], past_key_values=cache, use_cache=True, block_length=4)
        model.config._attn_implementation = implementation
        options = {"is_causal": False} if implementation == "flash_attention_2" else {"block_length": 4}
        logits.append(model(ids[:, 8:], past_key_values=cache, use_cache=True, **options).logits)
    check(*logits)


def test_wrong_arguments(model, packed):
    cache = DynamicCache(config=model.config)
    ids = torch.arange(8)[None]
    model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"8 \+ 4 columns, but it has 4"):
        model(ids[:, :4], torch.ones(1, 4), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="`position_ids`"):
        model(packed.input_ids, plan=packed.plan)


def test_check_diffusion_model(model):
    check_diffusion_model(model)
    model_type = model.config.model_type
    with pytest.raises(
        ValueError, match=rf"\(sdar, sdar_moe.*`{type(model.model).__name__}` .*`{model_type}` has no language"
    ):
        check_diffusion_model(model.model)
    peft = pytest.importorskip("peft")
    check_diffusion_model(peft.get_peft_model(model, peft.LoraConfig()))


def test_check_other_models():
    config = Qwen3Config(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4)
    with pytest.raises(ValueError, match="`Qwen3ForCausalLM` of model type `qwen3` is none of them"):
        check_diffusion_model(Qwen3ForCausalLM(config))
    with pytest.raises(ValueError, match="`Linear` of model type `None`"):
        check_diffusion_model(torch.nn.Linear(1, 1))
