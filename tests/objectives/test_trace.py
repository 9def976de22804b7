"""Rounds of TraceRL against the published numbers, and what every set of rounds must be."""

import json
import os
from pathlib import Path

import pytest
import torch

from dllm_trl.objectives import OBJECTIVES, make_objective
from dllm_trl.objectives.trace import TraceObjective, step_map_from_history, trace_rounds
from dllm_trl.types import Grid, Round


ORACLES = Path(os.environ.get("DLLM_TRL_ORACLES", Path(__file__).parents[1] / "fixtures" / "oracles"))


def cases(name):
    return [pytest.param(c, id=c["name"]) for c in json.loads((ORACLES / f"{name}.json").read_text())["cases"]]


def columns(mask):
    return mask.nonzero().flatten().tolist()


def blocks_of(step_map, block_length, first_len):
    """Blocks of responses whose first one has `first_len` tokens."""
    if block_length is None:
        return None
    prompt_mask = torch.arange(block_length).expand(len(step_map), -1) < block_length - first_len[:, None]
    return Grid(block_length).canvas_blocks(prompt_mask.long(), step_map.size(1))


def rounds_of(inputs, block_length=None, first_len=None):
    step_map = torch.tensor([inputs["step_map"]])
    pads = torch.tensor([inputs.get("is_pad", [False] * step_map.size(1))])
    limit = inputs.get("post_num")
    scored = ~pads | (pads.cumsum(1) <= (step_map.size(1) if limit is None else limit))
    return trace_rounds(
        step_map, scored, blocks=blocks_of(step_map, block_length, first_len), shrink=inputs.get("shrink", 1)
    )


def check(rounds, expected):
    assert [{"masked": columns(r.masked[0]), "loss": columns(r.scored[0])} for r in rounds] == expected


@pytest.mark.parametrize("case", cases("trace_rounds_engine_grid"))
def test_rounds_on_the_grid_of_the_rollout(case):
    inputs = case["inputs"]
    check(rounds_of(inputs, inputs["block_size"], torch.tensor([inputs["first_len"]])), case["expected"])


def counts_pads_per_round(case):
    return case["inputs"].get("post_scope") == "round" and case["inputs"]["post_num"]


@pytest.mark.parametrize("case", [c for c in cases("trace_rounds_block") if not counts_pads_per_round(c.values[0])])
def test_rounds_on_a_grid_at_the_response_start(case):
    """The reference trainer's grid, which ours is for a prompt of whole blocks."""
    inputs = case["inputs"]
    check(rounds_of(inputs, inputs["block_size"], torch.tensor([inputs["block_size"]])), case["expected"])


@pytest.mark.parametrize("case", [c for c in cases("trace_rounds_block") if counts_pads_per_round(c.values[0])])
def test_pads_are_counted_per_sequence(case):
    """The reference can count them anew in each round and then scores more of them; masks are the same."""
    inputs = case["inputs"]
    rounds = rounds_of(inputs, inputs["block_size"], torch.tensor([inputs["block_size"]]))
    assert [columns(r.masked[0]) for r in rounds] == [r["masked"] for r in case["expected"]]
    pads = set(columns(torch.tensor(inputs["is_pad"])))
    ours = [p for r in rounds for p in columns(r.scored[0]) if p in pads]
    theirs = [p for r in case["expected"] for p in r["loss"] if p in pads]
    assert len(ours) == inputs["post_num"] and set(ours) < set(theirs)


@pytest.mark.parametrize("case", cases("trace_rounds_full"))
def test_rounds_of_full_attention(case):
    check(rounds_of(case["inputs"]), case["expected"])


@pytest.mark.parametrize("case", cases("collapse_steps"))
def test_shrink_merges_neighbouring_steps(case):
    """The largest step of each round is the step that its tokens are merged into."""
    steps = torch.tensor([case["inputs"]["steps"]])
    rounds = trace_rounds(steps, torch.ones_like(steps, dtype=torch.bool), shrink=case["inputs"]["s"])
    merged = sum(r.scored * steps[r.scored].max() for r in rounds)
    assert merged[0].tolist() == case["expected"]


@pytest.mark.parametrize("case", cases("step_map_from_history"))
def test_step_map_from_history(case):
    inputs = case["inputs"]
    canvases = torch.tensor([inputs["prev"], *inputs["snapshots"]])
    steps = step_map_from_history(canvases, inputs["mask_id"]) - 1 + inputs.get("start", 0)
    assert steps.tolist() == case["expected"]
    assert step_map_from_history(canvases[:1], inputs["mask_id"]).tolist() == [-1] * canvases.size(1)


@pytest.mark.parametrize("block_length", [1, 4, 8, None])
@pytest.mark.parametrize("shrink", [1, 2, 100])
def test_every_token_is_scored_once_in_a_batch(block_length, shrink):
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 12, (6, 13), generator=generator)
    lengths = torch.tensor([13, 1, 7, 12, 0, 9])
    steps[torch.arange(13) >= lengths[:, None]] = -1
    scored = (steps >= 0) & (torch.rand(6, 13, generator=generator) < 0.8)
    first_len = None if block_length is None else torch.randint(1, block_length + 1, (6,), generator=generator)
    blocks = blocks_of(steps, block_length, first_len)
    rounds = trace_rounds(steps, scored, blocks=blocks, shrink=shrink)
    assert len(rounds) <= (block_length or 12)
    assert torch.equal(sum(r.scored.int() for r in rounds), scored.int())
    for before, after in zip(rounds, rounds[1:], strict=False):
        assert not (after.masked & ~before.masked).any()  # what is revealed stays revealed
        revealed = before.masked & ~after.masked
        assert not (before.scored & ~revealed).any()  # and what is scored is revealed next
    # A row's rounds depend on no other row
    for row in range(6):
        own = trace_rounds(
            steps[row : row + 1],
            scored[row : row + 1],
            blocks=None if blocks is None else blocks[row : row + 1],
            shrink=shrink,
        )
        for i, r in enumerate(rounds):
            expected = own[i].scored[0] if i < len(own) else torch.zeros(13, dtype=torch.bool)
            assert torch.equal(r.scored[row], expected)


def test_nothing_to_score_is_one_empty_round():
    rounds = trace_rounds(torch.full((2, 3), -1), torch.zeros(2, 3, dtype=torch.bool))
    assert len(rounds) == 1 and not rounds[0].masked.any() and not rounds[0].scored.any()


def test_objectives_by_name_or_as_they_are():
    assert make_objective("trace", OBJECTIVES, shrink=3) == TraceObjective(shrink=3) == OBJECTIVES["trace"](shrink=3)
    assert TraceObjective().replays_rollout and not TraceObjective(shrink=2).replays_rollout

    def everything(rows):
        return [Round(rows.trained, rows.trained)]

    made = make_objective(everything, OBJECTIVES)
    assert made.function is everything and make_objective(made, OBJECTIVES) is made
    for wrong in ("traces", TraceObjective, 3, None):
        with pytest.raises(ValueError, match="`objective` must be one of"):
            make_objective(wrong, OBJECTIVES)
