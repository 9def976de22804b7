"""Coupled GRPO: masks, estimate and loss against the published numbers, and what a pair promises."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_trl.objectives import make_rl_objective
from dllm_trl.objectives.corruptions import random_mask
from dllm_trl.objectives.coupled import CoupledObjective, coupled_pair, coupled_rounds
from dllm_trl.scoring import Scorer
from dllm_trl.trainers import CoupledGRPOTrainer
from dllm_trl.trainers.draws import CountingDraws

from ..trainers.masked_rl import check_that_it_trains, loss_of
from ..trainers.tiny_rl import make_model
from .test_corruptions import make_rows


def cases(oracles_dir, name):
    found = json.loads((oracles_dir / f"{name}.json").read_text())["cases"]
    assert found
    return [(SimpleNamespace(**case["inputs"]), case["expected"]) for case in found]


def test_the_estimate_of_the_paper(oracles_dir):
    for given_, expected in cases(oracles_dir, "coupled_grpo_token_logp"):
        drawn = torch.tensor([given_.mask])
        everything = torch.ones_like(drawn)
        rounds = coupled_rounds(drawn, torch.tensor([[given_.t]]), everything, everything)
        logps = torch.tensor([[given_.lp_full], [given_.lp_mask], [given_.lp_comp]], dtype=torch.float64)
        found = CoupledObjective().reduce(logps, rounds)
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_masks_of_the_paper(oracles_dir):
    for given_, expected in cases(oracles_dir, "mask_apple_coupled"):
        uniform = torch.tensor([given_.u[given_.prompt_len :]])
        drawn, ratio = random_mask(uniform, torch.tensor([[given_.t]]), lower=0.0, upper=1.0)
        everything = torch.ones_like(drawn)
        rounds = coupled_rounds(drawn, ratio, everything, everything)
        assert [[False] * given_.prompt_len + one.masked[0].tolist() for one in rounds] == expected
        assert all(one.prompt_masked is None for one in rounds)


def test_the_pairs_of_the_reference(oracles_dir):
    for given_, expected in cases(oracles_dir, "mask_coupled_pair_full"):
        drawn, pads = torch.tensor([given_.mask]), torch.tensor([given_.tail_pad])
        pair = coupled_pair(drawn, ~pads, torch.ones_like(pads))
        found = [
            {"masked": one.masked[0].nonzero().flatten().tolist(), "loss": one.scored[0].nonzero().flatten().tolist()}
            for one in pair
            if one.scored.any()  # what scores nothing is not computed
        ]
        assert found == expected


def test_the_loss_of_the_paper(tmp_path, monkeypatch, oracles_dir):
    """A mean over tokens: TRL's `dapo` over an optimizer step, or `bnpo` over a micro-batch."""
    for given_, expected in cases(oracles_dir, "coupled_grpo_loss"):
        options = {
            "epsilon": getattr(given_, "eps_low", 0.5),
            "epsilon_high": getattr(given_, "eps_high", 0.5),
            "beta": getattr(given_, "beta", 0.01),
        }
        for loss_type in ("dapo", "bnpo"):
            found = loss_of(tmp_path, monkeypatch, CoupledGRPOTrainer, given_, loss_type=loss_type, **options)
            assert found == pytest.approx(expected, rel=1e-6)


def test_by_hand():
    """A response of four tokens, the last behind EOS: drawn are the first and what does not count."""
    drawn, trained = torch.tensor([[True, False, False, True]]), torch.tensor([[True, True, True, False]])
    rounds = coupled_rounds(drawn, torch.tensor([[0.25]]), trained, torch.ones_like(trained))
    shown = [
        "".join(".m1"[int(m) + int(s)] for m, s in zip(one.masked[0], one.scored[0], strict=True)) for one in rounds
    ]
    assert shown == ["111m", "1..m", ".11m"]
    logps = torch.tensor([[-1.0, -2.0, -3.0, 0.0], [-4.0, 0.0, 0.0, 0.0], [0.0, -6.0, -3.0, 0.0]]).unsqueeze(1)
    expected = [(-1 - 4 / 0.25) / 2, (-2 - 6 / 0.75) / 2, (-3 - 3 / 0.75) / 2, 0]
    assert CoupledObjective().reduce(logps, rounds)[0].tolist() == pytest.approx(expected)
    assert CoupledObjective("pair").reduce(logps[1:], rounds_of_pair(rounds))[0].tolist() == [-4, -6, -3, 0]


def rounds_of_pair(rounds):
    for one in rounds:
        one.loss_weight = None
    return rounds[1:]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    views=st.integers(1, 3),
    seed=st.integers(0, 1000),
    attention=st.sampled_from(["block", "full"]),
    bounds=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)).map(sorted),
)
@settings(max_examples=60, deadline=None)
def test_pairs_are_disjoint_and_complete(lengths, views, seed, attention, bounds):
    rows = make_rows(lengths, [1 + i for i in range(len(lengths))], attention=attention)
    lower, upper = bounds
    for estimate, times in (("pair", 1), ("diffucoder", 2)):
        objective = CoupledObjective(estimate, lower, upper, views)
        rows.draws = objective.draw(rows, CountingDraws(seed, 0))
        ratio = rows.draws["ratio"]
        assert (ratio >= lower - 1e-6).all() and (ratio <= upper + 1e-6).all()
        for view in range(views):
            rounds = objective.rounds(rows, view)
            first, second = rounds[-2:]
            assert not (first.scored & second.scored).any()
            assert torch.equal(first.scored | second.scored, rows.trained)
            assert sum(one.scored.int() for one in rounds).max() <= times
            unknown = rows.canvas_mask.bool() & ~rows.trained
            for one in rounds:
                assert torch.equal(one.masked & ~one.scored, unknown)


def test_one_block_is_full_attention():
    """The same masks, and in a model whose block holds everything the same numbers."""
    model = make_model("sdar", block_size=64).eval()
    block = make_rows([5, 8], [3, 3], attention="block", block_length=64)
    block.canvas_ids = block.canvas_ids * (torch.arange(block.canvas_ids.numel()) % 20 + 6).view_as(block.canvas_ids)
    full = make_rows([5, 8], [3, 3], attention="full", block_length=64)
    full.canvas_ids = block.canvas_ids
    objective, found = CoupledObjective(), []
    for rows in (block, full):
        rows.draws = objective.draw(rows, CountingDraws(0, 0))
        rounds = objective.rounds(rows)
        with torch.no_grad():
            scores = Scorer(mask_token_id=2)(model, rows, rounds)
        found.append(objective.reduce(scores.dense("logps"), rounds))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("estimate", ["diffucoder", "pair"])
@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_it_trains(tmp_path, family, estimate):
    check_that_it_trains(tmp_path, CoupledGRPOTrainer, family, estimate=estimate)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"lower": 0.0}, "`lower="),
        ({"upper": 1.0}, "`upper="),
        ({"lower": 0.8, "upper": 0.2}, "`lower=0.8`, `upper=0.2`: must be 0 <= lower <= upper <= 1"),
        ({"lower": float("nan")}, "`lower="),
        ({"estimate": "half"}, "`estimate`"),
        ({"size": 2}, "'size'"),
    ],
)
def test_refused_options(options, names):
    with pytest.raises(ValueError, match=names):
        make_rl_objective("coupled", **options)
