"""AGRPO against the numbers of the public code, by hand, and in training."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_trl.objectives.agrpo import AGRPOObjective, agrpo_loss
from dllm_trl.objectives.steps import drawn_rounds, renumbered, sample_steps
from dllm_trl.objectives.trace import TraceObjective
from dllm_trl.trainers.draws import CountingDraws
from dllm_trl.types import Grid, Rows

from .in_training import cases, check_learns, check_ratio_is_one, trainer_of


FAMILIES = pytest.mark.parametrize("family", ["sdar", "llada"])


def padded(rows, fill):
    width = max(map(len, rows))
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows])


def rows_of(step_map, trained=None, **kwargs):
    """Responses of full attention whose tokens were committed in these steps."""
    ones, prompt = torch.ones_like(step_map), torch.ones(len(step_map), 1, dtype=torch.long)
    trained = step_map >= 0 if trained is None else trained
    return Rows(prompt, prompt, ones, ones, Grid(None, "response"), trained, step_map, **kwargs)


def test_plan(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "agrpo_plan"):
        step_map, eos = padded(inputs["step_maps"], -1), padded(inputs["is_eos"], True)
        entropies = padded(inputs["entropies"], 0.0).double()
        numbers = torch.tensor(inputs["u"], dtype=torch.double)
        if inputs["low_discrepancy"]:
            numbers = (torch.tensor(inputs["perm"]) + numbers) / len(numbers)
        numbers = numbers.view(-1, inputs["mc_samples"])
        chosen = entropies if inputs["importance"] == "entropy" else None
        steps, weights = sample_steps(step_map, ~eos, numbers, chosen)
        rounds = drawn_rounds(step_map, step_map >= 0, steps, weights)
        for row, plan in enumerate(expected):
            if not plan or not plan["steps"]:  # a response of EOS alone is skipped
                assert (steps[row] == -1).all() and (weights[row] == 0).all(), name
                continue
            assert steps[row].tolist() == plan["steps"], name
            assert weights[row].tolist() == pytest.approx(plan["weights"], rel=1e-6), name
            for draw, (ours, theirs) in enumerate(zip(rounds, plan["rounds"], strict=True)):
                repeats = plan["steps"].count(plan["steps"][draw])
                if plan["steps"].index(plan["steps"][draw]) < draw:  # drawn before, where it has the weight of both
                    assert not ours.scored[row].any(), name
                    continue
                assert ours.masked[row].nonzero().flatten().tolist() == theirs["masked"], name
                assert ours.scored[row].nonzero().flatten().tolist() == theirs["loss"], name
                assert ours.loss_weight[row, 0].item() == pytest.approx(repeats * plan["weights"][draw], rel=1e-6)


def test_loss(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "agrpo_loss"):
        new, old, ref = (padded(inputs[f"logp_{key}"], 0.0).double() for key in ("new", "old", "ref"))
        step_map = padded(inputs["step_maps"], -1)
        steps, weights = torch.tensor(inputs["steps"]), torch.tensor(inputs["weights"], dtype=torch.double)
        rounds = drawn_rounds(step_map, step_map >= 0, steps, weights)
        worth = torch.tensor(inputs["adv"], dtype=torch.double)[:, None]
        loss = agrpo_loss(new, old, ref, worth, rounds, inputs["eps_low"], inputs["eps_high"], inputs["beta"])
        # Ours is a mean over responses, theirs a sum that is divided by the responses to one prompt
        theirs = loss * len(new) / inputs["group_size"]
        assert theirs.item() == pytest.approx(expected, rel=1e-6), name


def test_by_hand():
    """Steps 0, 1, 2 of entropies 1, 2 and 1: a uniform draw at 0.3 is step 0, one by entropy step 1."""
    step_map, entropies = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[1.0, 0.5, 1.5, 1.0]])
    every, at = step_map >= 0, torch.tensor([[0.3, 0.7]])
    steps, weights = sample_steps(step_map, every, at)
    assert steps.tolist() == [[0, 2]] and weights.tolist() == [[1.0, 1.0]]
    steps, weights = sample_steps(step_map, every, at, entropies)
    assert steps.tolist() == [[1, 1]] and weights[0].tolist() == pytest.approx([2 / 3, 2 / 3])
    first, second = drawn_rounds(step_map, every, steps, weights)
    assert first.masked.tolist() == [[False, True, True, True]] and not second.scored.any()
    assert first.scored.tolist() == [[False, True, True, False]] and first.loss_weight[0, 0] == pytest.approx(4 / 3)
    # Ratios of 1.1 and 1.5 where A = 2, clipped at 1.2: -(4/3) (2.2 + 2.4) / 2
    new = torch.tensor([[0.0, math.log(1.1), math.log(1.5), 0.0]])
    loss = agrpo_loss(new, torch.zeros_like(new), None, torch.tensor([[2.0]]), [first, second], 0.2, 0.2)
    assert loss.item() == pytest.approx(-(4 / 3) * 4.6 / 2)


def test_steps_that_committed_nothing_to_train_are_never_drawn():
    """Steps 1 and 3 wrote only what comes after EOS; the last response has nothing that counts."""
    step_map = torch.tensor([[0, 2, 4, 1, 3], [0, 0, 1, 2, -1]])
    trained = torch.tensor([[True, True, True, False, False], [False] * 5])
    turns, values = renumbered(step_map, trained)
    assert turns.tolist() == [[0, 1, 2, -1, -1], [-1] * 5] and values[0, :3].tolist() == [0, 2, 4]
    objective = AGRPOObjective(num_samples=3)
    rows = rows_of(step_map, trained)
    rows.draws = objective.draw(rows, CountingDraws(0, 0))
    assert rows.draws["steps0"].tolist() == [[0, 2, 4], [-1, -1, -1]]
    rounds = objective.rounds(rows)
    assert torch.equal(sum(r.scored.long() for r in rounds), trained.long())
    assert rounds[1].masked[0].tolist() == [False, True, True, False, True]  # as the rollout saw it
    # No entropy anywhere says nothing about the steps: as if they were equal
    steps, weights = sample_steps(step_map[:1], step_map[:1] >= 0, torch.tensor([[0.5]]), torch.zeros(1, 5))
    assert steps.item() == 2 and weights.item() == 1


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.integers(1, 9), st.integers(0, 1000), st.booleans())
def test_the_estimate_is_unbiased(steps, num_samples, seed, by_entropy):
    """Over the strata of a grid so fine that it stands for all numbers, each step's weight adds up to 1/T."""
    step_map = torch.unique(torch.tensor([steps]), return_inverse=True)[1]
    generator = torch.Generator().manual_seed(seed)
    entropies = torch.rand(step_map.shape, generator=generator) + 0.1 if by_entropy else None
    fine = ((torch.arange(20000) + 0.5) / 20000)[None]
    drawn, weights = sample_steps(step_map, step_map >= 0, fine, entropies)
    last = int(step_map.max()) + 1
    total = torch.zeros(last).index_add(0, drawn[0], weights[0]) / 20000
    torch.testing.assert_close(total, torch.full((last,), 1 / last), rtol=0.02, atol=1e-3)
    # What a row draws depends on no other row, and on no stratum more than once
    rows = rows_of(step_map.repeat(3, 1), entropies=None if entropies is None else entropies.repeat(3, 1))
    objective = AGRPOObjective(num_samples=num_samples, importance="entropy" if by_entropy else "uniform")
    draws, alone = objective.draw(rows, CountingDraws(seed, 7)), objective.draw(rows[2:], CountingDraws(seed, 9))
    assert torch.equal(draws["steps0"][2:], alone["steps0"]) and torch.equal(draws["weights0"][2:], alone["weights0"])
    assert (draws["steps0"].diff() >= 0).all()
    if not by_entropy and num_samples % last == 0:
        assert draws["steps0"][0].unique().tolist() == list(range(last))


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"num_views": 1.5}, {"importance": "loss"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        AGRPOObjective(**options)


@FAMILIES
@pytest.mark.parametrize("importance", ["uniform", "entropy"])
def test_it_trains(tmp_path, family, importance):
    options = {"num_samples": 3, "importance": importance}
    trainer = check_learns(tmp_path, family, "agrpo", objective_kwargs=options, beta=0.04, num_iterations=2)
    assert trainer.objective == AGRPOObjective(num_views=2, **options)


@FAMILIES
def test_the_same_steps_for_old_and_new(tmp_path, family):
    """All steps of a response drawn as often as there are: what is scored are the rounds of the trace."""
    objective = AGRPOObjective(num_views=2, num_samples=40, importance="entropy")
    trainer, seen = check_ratio_is_one(tmp_path, family, objective, denoising_steps=4)
    assert not torch.equal(seen[0].rows.draws["steps0"], seen[0].rows.draws["steps1"])
    replayed = TraceObjective().rounds(seen[0].rows)
    scores = trainer.scorer(trainer.model, seen[0].rows, replayed).dense("logps").sum(0)
    torch.testing.assert_close(seen[0].logps[seen[0].scored], scores[seen[0].scored], rtol=1e-5, atol=1e-5)


def test_rollouts_without_entropies_are_refused(tmp_path):
    trainer = trainer_of(tmp_path, "sdar", AGRPOObjective(importance="entropy"), max_steps=1)
    decode = trainer.rollouts.generate
    trainer.rollouts.generate = lambda *args: replace(decode(*args), entropies=None)
    with pytest.raises(ValueError, match="`rollouts` returned one without `entropies`"):
        trainer.train()
