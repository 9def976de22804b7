"""The family's own attention, drawn: row = query, column = key, x = may attend."""

import pytest
import torch
from transformers import AutoConfig, DynamicCache

import dllm_trl  # noqa: F401
from dllm_trl.modeling.masks import adapt_mask, block_causal_mask, pad_free_positions


@pytest.fixture
def config():
    config = AutoConfig.for_model("sdar", vocab_size=8, hidden_size=8, mask_token_id=7, num_hidden_layers=1)
    config._attn_implementation = "sdpa_plan"
    return config


def drawn(mask):
    return ["".join("x" if seen else "." for seen in row) for row in mask]


def draw(config, length, block_length, attention_mask=None, position_ids=None, cache=None):
    if attention_mask is not None:
        attention_mask = torch.tensor(attention_mask)
    if position_ids is None:
        position_ids = pad_free_positions(attention_mask)[:, -length:]
    batch = 1 if attention_mask is None else len(attention_mask)
    embeds = torch.zeros(batch, length, 8)
    mask = block_causal_mask(config, embeds, attention_mask, torch.as_tensor(position_ids), cache, block_length)
    assert mask.shape[:2] == (batch, 1)
    return [drawn(row[0]) for row in mask]


def test_blocks_are_counted_without_padding(config):
    left, holes = draw(config, 9, 4, [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1, 1, 0, 0]])
    assert left == [
        ".........",
        ".........",
        "..xxxx...",
        "..xxxx...",
        "..xxxx...",
        "..xxxx...",
        "..xxxxxxx",
        "..xxxxxxx",
        "..xxxxxxx",
    ]
    # Tokens at columns 0, 1, 3, 5 are the first block, the one at 6 is the second. Padding is not looked at.
    real = [0, 1, 3, 5, 6]
    assert [holes[i] for i in real] == 4 * ["xx.x.x..."] + ["xx.x.xx.."]


def test_packed_sequences(config):
    (rows,) = draw(config, 6, 2, position_ids=[[0, 1, 2, 0, 1, 2]])
    assert rows == ["xx....", "xx....", "xxx...", "...xx.", "...xx.", "...xxx"]
    # With equal block numbers on both sides of the border.
    (rows,) = draw(config, 4, 4, position_ids=[[0, 1, 0, 1]])
    assert rows == ["xx..", "xx..", "..xx", "..xx"]


@pytest.mark.parametrize("attention_mask", [None, [[1, 1, 1, 1, 1, 1, 1, 1]], [[0, 1, 1, 1, 1, 1, 1, 1]]])
def test_queries_over_a_cache(config, attention_mask):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
    positions = [[3, 4, 5, 6, 7]] if attention_mask is None else None
    (rows,) = draw(config, 5, 4, attention_mask, positions, cache)
    expected = {
        None: ["xxxx....", "xxxxxxxx", "xxxxxxxx", "xxxxxxxx", "xxxxxxxx"],
        1: ["xxxx....", "xxxxxxxx", "xxxxxxxx", "xxxxxxxx", "xxxxxxxx"],
        0: [".xxxx...", ".xxxx...", ".xxxxxxx", ".xxxxxxx", ".xxxxxxx"],
    }
    # In the padded row the queries are tokens 2 to 6.
    assert rows == expected[attention_mask and attention_mask[0][0]]


def test_given_positions_decide(config):
    (rows,) = draw(config, 4, 4, [[1, 1, 1, 1]], [[2, 3, 4, 5]])
    assert rows == ["xx..", "xx..", "xxxx", "xxxx"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.uint8])
def test_boolean_masks_in_every_implementation(dtype):
    generator = torch.Generator().manual_seed(0)
    for heads in (1, 3):
        mask = torch.rand(2, heads, 5, 6, generator=generator) < 0.5
        given = mask.to(dtype)
        assert torch.equal(adapt_mask(given, "sdpa_plan", torch.float32, 2), mask)
        eager = adapt_mask(given, "eager", torch.bfloat16, 2)
        assert eager.dtype == torch.bfloat16
        assert torch.equal(eager == 0, mask)
        assert (eager[~mask] == torch.finfo(torch.bfloat16).min).all()
        flex = adapt_mask(given, "flex_attention", torch.float32, 2)
        assert flex.shape == (2, heads, 5, 6)
        indices = torch.meshgrid(*(torch.arange(n) for n in mask.shape), indexing="ij")
        assert torch.equal(flex.mask_mod(*indices), mask)


def test_additive_masks_are_left_alone():
    mask = torch.randn(1, 1, 3, 3)
    assert adapt_mask(mask, "eager", torch.float32, 1) is mask
