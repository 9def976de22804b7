"""Corruptions that objectives share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_trl.objectives.corruptions import (
    block_random_masks,
    block_random_rounds,
    draw_block_random,
    draw_prompt,
    mask_counted,
)
from dllm_trl.trainers.draws import CountingDraws
from dllm_trl.types import Grid, Rows


def make_rows(lengths, prompts, width=None, pad=0, block_length=4, attention="block"):
    """Responses of `lengths` tokens, each followed by two that are not trained, behind left-padded `prompts`."""
    width = max(lengths) + 2 if width is None else width
    columns, lengths, prompts = torch.arange(width), torch.tensor(lengths)[:, None], torch.tensor(prompts)[:, None]
    places = torch.arange(int(prompts.max()) + pad)
    prompt_mask = (places >= len(places) - prompts).long()
    canvas_mask = (columns < lengths + 2).long()
    ids = torch.ones_like(canvas_mask)
    grid = Grid.of(attention, block_length)
    return Rows(torch.ones_like(prompt_mask), prompt_mask, ids, canvas_mask, grid, columns < lengths)


def test_by_hand():
    """Blocks of three; the second of the three that hold a trained token, two of its tokens."""
    trained = torch.tensor([[True] * 8 + [False] * 4])
    blocks = torch.arange(12)[None] // 3 + 5
    uniform = torch.tensor([[0.1, 0.2, 0.14, 0.5, 0.3, 0.4, 0.9, 0.9, 0.0, 0.0, 0.0, 0.0]])
    masked = block_random_masks(trained, blocks, torch.tensor([[0.4]]), torch.tensor([[0.5]]), uniform)
    assert masked.nonzero()[:, 1].tolist() == [0, 2, 4, 5, 6, 7]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    offset=st.integers(0, 5),
    num_samples=st.integers(1, 4),
    seed=st.integers(0, 1000),
    attention=st.sampled_from(["block", "full"]),
)
@settings(max_examples=60, deadline=None)
def test_one_block_in_part_and_all_later_ones(lengths, offset, num_samples, seed, attention):
    rows = make_rows(lengths, [offset + i for i in range(len(lengths))], attention=attention)
    rows.draws = draw_block_random(rows, CountingDraws(seed, 0), num_samples)
    rounds = block_random_rounds(rows, num_samples, earlier=0.0)
    for row, length in enumerate(lengths):
        blocks = rows.blocks[row]
        chosen = []
        for one in rounds:
            scored = one.scored[row]
            assert not one.prompt_masked[row].any() and not (scored & ~rows.trained[row]).any()
            assert (
                one.masked[row, length : length + 2].all() == (length > 0) and not one.masked[row, length + 2 :].any()
            )
            if not length:
                assert not scored.any()
                continue
            first = blocks[scored].min()
            assert (scored | (blocks <= first) | ~rows.trained[row]).all()
            chosen.append(first.item())
        if length:
            assert len(set(chosen)) == min(num_samples, blocks[rows.trained[row]].unique().numel())


def test_every_block_and_every_count_is_equally_likely():
    count, number = 4000, torch.arange(4000)
    trained = torch.ones(count, 8, dtype=torch.bool)
    uniform, blocks = (
        torch.rand(count, 8, generator=torch.Generator().manual_seed(0)),
        torch.arange(8).expand(count, -1) // 4,
    )
    masked = block_random_masks(
        trained, blocks, ((number % 40) / 40)[:, None], ((number // 40) / 100)[:, None], uniform, earlier=0.0
    )
    counts = torch.bincount(masked.sum(1))
    assert counts[1:].tolist() == [500] * 8  # 1 to 4 of the last block; 4 and 1 to 4 of the first
    assert masked[:, 4:].float().mean(0).std() < 0.02


def test_prompts_and_earlier_tokens_with_their_probability():
    rows = make_rows([200], [400], block_length=100, attention="full")
    rows.draws = draw_block_random(rows, CountingDraws(0, 0), 2)
    rounds = block_random_rounds(rows, 2)
    assert abs(rounds[0].prompt_masked.float().mean() - 0.15) < 0.05
    assert torch.equal(rounds[0].prompt_masked, rounds[1].prompt_masked)
    earlier = [r.scored[0, :100] for r in rounds if not r.scored[0, 100:200].all()]
    assert len(earlier) == 1 and abs(earlier[0].float().mean() - 0.15) < 0.1


def test_padding_and_neighbours_change_nothing():
    rows = make_rows([7, 3], [5, 2])
    wider = make_rows([7, 3], [5, 2], width=20, pad=3)
    alone = make_rows([3], [2])
    for one, first in ((rows, 0), (wider, 0), (alone, 1)):
        one.draws = draw_block_random(one, CountingDraws(3, first), 3)
    many, padded, single = (block_random_rounds(one, 3) for one in (rows, wider, alone))
    for one, two, three in zip(many, padded, single, strict=True):
        assert torch.equal(one.masked, two.masked[:, :9]) and not two.masked[:, 9:].any()
        assert torch.equal(one.prompt_masked, two.prompt_masked[:, 3:])
        assert torch.equal(one.masked[1, :5], three.masked[0]) and torch.equal(one.scored[1, :5], three.scored[0])
        assert torch.equal(one.prompt_masked[1, 3:], three.prompt_masked[0])


def test_numbers_of_a_prompt_lie_on_its_tokens():
    rows = make_rows([3, 3], [5, 2])
    assert torch.equal(draw_prompt(rows, CountingDraws(0, 0)) > 0, rows.prompt_mask.bool())


@pytest.mark.parametrize(("count", "expected"), [(0, []), (2, [1, 3]), (9, [0, 1, 3])])
def test_counted(count, expected):
    trained = torch.tensor([[True, True, False, True]])
    masked = mask_counted(trained, torch.tensor([[count]]), torch.tensor([[0.9, 0.1, 0.0, 0.3]]))
    assert masked.nonzero()[:, 1].tolist() == expected
