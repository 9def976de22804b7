"""What must hold of rounds for any rollout."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_trl.objectives import OBJECTIVES
from dllm_trl.objectives.trace import TraceObjective
from dllm_trl.scoring import Scorer
from dllm_trl.trainers.draws import CountingDraws
from dllm_trl.types import Grid, Rows

from ..trainers.tiny_rl import make_model


WIDTH, PROMPT = 9, 5


@st.composite
def rollouts(draw, grid=None):
    """Rows of ragged prompts and responses, decoded in any steps that go from block to block."""
    size = draw(st.integers(1, 4))
    grid = grid or draw(st.sampled_from([Grid(1), Grid(3), Grid(4), Grid(16), Grid(None, "response")]))
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, PROMPT + 1, (size, 1), generator=generator)
    lengths = torch.randint(0, WIDTH + 1, (size, 1), generator=generator)
    prompt_mask = (torch.arange(PROMPT) >= PROMPT - prompts).long()
    canvas_mask = (torch.arange(WIDTH) < lengths).long()
    ids = [torch.randint(3, 30, (size, n), generator=generator) for n in (PROMPT, WIDTH)]
    blocks = grid.canvas_blocks(prompt_mask, WIDTH)
    steps = torch.randint(0, draw(st.integers(1, WIDTH)), (size, WIDTH), generator=generator) + 100 * blocks
    trained = torch.arange(WIDTH) < (lengths * torch.rand(size, 1, generator=generator)).ceil()
    steps = torch.where(canvas_mask.bool(), steps, -1)
    entropies = torch.rand(size, WIDTH, generator=generator) * canvas_mask
    return Rows(ids[0], prompt_mask, ids[1], canvas_mask, grid, trained, steps, entropies=entropies)


def total(masks):
    return sum(mask.int() for mask in masks)


# --------------------------------------------------------------------------------------------------------------- trace


@settings(max_examples=60, deadline=None)
@given(rollouts(), st.integers(1, 4))
def test_trace_rounds_partition_the_response(rows, shrink):
    """Every trained token once, in a context that only grows, in no more rounds than there are steps."""
    rounds = TraceObjective(shrink=shrink).rounds(rows)
    assert torch.equal(total(r.scored for r in rounds), rows.trained.int())
    assert torch.equal(rounds[0].masked, rows.step_map >= 0)
    for before, after in zip(rounds, rounds[1:], strict=False):
        revealed = before.masked & ~after.masked
        assert not (after.masked & ~before.masked).any() and not (before.scored & ~revealed).any()
    single = TraceObjective(shrink=1).rounds(rows)
    assert len(rounds) == max(-(-len(single) // shrink), 1)
    blocks = rows.blocks if rows.grid.attention == "block" else torch.zeros_like(rows.step_map)
    for row in range(len(rows)):
        for block in blocks[row].unique():
            mine = (blocks[row] == block) & (rows.step_map[row] >= 0)
            steps = rows.step_map[row][mine].unique()
            # Merged steps are neighbours: each round takes a stretch of the block's distinct steps
            taken = [rows.step_map[row][mine & r.masked[row]].unique() for r in rounds]
            assert all(torch.equal(found, steps[i * shrink :]) for i, found in enumerate(taken))


# ------------------------------------------------------------------------------------------------------- one block


BOTH = [name for name, made in OBJECTIVES.items() if set(made.attentions) == {"block", "full"}]


@pytest.fixture(scope="module")
def model():
    return make_model("sdar").eval()


@pytest.mark.parametrize("name", BOTH)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_one_block_is_full_attention(model, name, data):
    """A block that holds prompt and response: the rounds and log-probabilities are those of full attention."""
    rows = data.draw(rollouts(Grid(PROMPT + WIDTH)))
    whole = replace(rows, grid=Grid(None, "response"))
    made, found = OBJECTIVES[name](), []
    for one in (rows, whole):
        one = replace(one, draws=made.draw(one, CountingDraws(7, 0)))
        rounds = [r for r in made.rounds(one) if r.scored.any()]
        with torch.no_grad():
            scores = Scorer(mask_token_id=2)(model, one, rounds).dense("logps") if rounds else torch.zeros(0)
        found.append((rounds, scores))
    (rounds, logps), (others, expected) = found
    assert [r.scored.tolist() for r in rounds] == [r.scored.tolist() for r in others]
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_rounds_of_any_rollout(name, data):
    """Rows without a token beside others, steps in any order: what is masked exists, what is scored is trained."""
    made = OBJECTIVES[name]()
    rows = data.draw(rollouts().filter(lambda rows: rows.grid.attention in made.attentions))
    rows = replace(rows, draws=made.draw(rows, CountingDraws(data.draw(st.integers(0, 99)), 3)))
    for view in range(made.num_views):
        for one in made.rounds(rows, view) + made.old_rounds(rows, view):
            assert not (one.masked & ~rows.canvas_mask.bool()).any() and not (one.scored & ~rows.trained).any()
            assert one.loss_weight is None or one.loss_weight[one.scored].isfinite().all()
        if not made.partial:
            assert torch.equal(torch.stack([r.scored for r in made.rounds(rows, view)]).any(0), rows.trained)
