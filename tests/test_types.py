"""The data that flows from engine to loss, checked at its border."""

import numpy as np
import pytest
import torch

from dllm_trl.types import Grid, Round, Rows


BLOCKS = Grid(4)


def make_rows(grid=BLOCKS, **more):
    prompt_mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    canvas_mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    return Rows(prompt_mask * 7, prompt_mask, canvas_mask * 9, canvas_mask, grid, **more)


@pytest.mark.parametrize("block_length", [1, 3, 4, 8])
def test_grid_arithmetic(block_length):
    grid = Grid(block_length)
    for length in range(1, 20):
        blocks = [position // block_length for position in range(length)]
        assert [grid.block(position) for position in range(length)] == blocks
        assert [grid.offset(position) for position in range(length)] == [
            i - b * block_length for i, b in enumerate(blocks)
        ]
        assert grid.count(length) == blocks[-1] + 1 and grid.ceil(length) == grid.count(length) * block_length
        assert grid.floor(length) == (length // block_length) * block_length
    for kind in (np.arange(9), torch.arange(9)):
        assert grid.block(kind).tolist() == [i // block_length for i in range(9)]


def test_grid_of_a_whole_response():
    grid = Grid.of("full", None)
    assert grid.anchor == "response" and grid.attention == "full"
    assert grid.block(torch.arange(5)).tolist() == [0] * 5 and grid.count(7) == 1 and grid.ceil(7) == 7


def test_blocks_count_from_the_anchor():
    assert make_rows().blocks.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert make_rows(Grid(2, "response")).blocks.tolist() == [[0, 0, 1, 1, 2]] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "`block_length` must be at least 1"), ((4, "middle"), "`anchor` must be"), ((None,), "`block_length`")],
)
def test_grids_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Grid(*arguments)


def test_rows_travel_through_a_batch():
    steps = torch.tensor([[0, 1, 2, 3, -1], [0, 0, 1, 1, 2]])
    rows = make_rows(trained=steps == 0, step_map=steps, draws={"level": torch.rand(2, 3)})
    batch = {**rows.to_batch(), "advantages": torch.zeros(2)}
    assert all(len(value) == 2 for value in batch.values())
    again = Rows.from_batch({key: value.flip(0) for key, value in batch.items()}, Grid(4))
    for name in ("prompt_ids", "prompt_mask", "canvas_ids", "canvas_mask", "trained", "step_map"):
        assert torch.equal(getattr(again, name), getattr(rows, name).flip(0))
    assert torch.equal(again.draws["level"], rows.draws["level"].flip(0))
    part = rows[1:]
    assert len(part) == 1 and torch.equal(part.draws["level"], rows.draws["level"][1:]) and part.grid == rows.grid


def test_a_batch_without_rows_is_an_error():
    with pytest.raises(ValueError, match="The batch has no rows"):
        Rows.from_batch({"prompt_ids": torch.zeros(1, 2)}, Grid(4))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="`trained` must have shape"):
        make_rows(trained=torch.ones(2, 4) > 0)
    with pytest.raises(ValueError, match=r"`draws\['level'\]` must have shape"):
        make_rows(draws={"level": torch.zeros(3, 1)})
    yes, no = torch.ones(1, 2) > 0, torch.zeros(1, 2) > 0
    with pytest.raises(ValueError, match="`scored` must be a subset"):
        Round(masked=no, scored=yes)
    with pytest.raises(ValueError, match="`loss_weight` must have shape"):
        Round(masked=yes, scored=yes, loss_weight=torch.ones(1, 3))
