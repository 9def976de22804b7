"""DiPO against the numbers of the public code, by hand, and in training."""

import math

import pytest
import torch

from dllm_trl.objectives import LossInputs
from dllm_trl.objectives.dipo import DiPOObjective, dipo_loss
from dllm_trl.objectives.trace import TraceObjective
from dllm_trl.types import Grid, Round, Rows

from .in_training import cases, check_learns, check_ratio_is_one


FAMILIES = pytest.mark.parametrize("family", ["sdar", "llada"])


def test_loss(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "dipo_loss"):
        keys = ("logp_new", "logp_old", "logp_ref", "adv")
        new, old, ref, advantages = (torch.tensor(inputs[key], dtype=torch.double) for key in keys)
        mask, eps = torch.tensor(inputs["mask"]), inputs.get("eps", 0.2)
        options = (eps, eps + 0.08, inputs["beta"], inputs["kl"])
        for given in (advantages, advantages[:, None].expand_as(mask)):
            found = dipo_loss(new, old, ref, given, mask, mask.sum(), *options).item()
            assert found == pytest.approx(expected, rel=1e-6), name


def test_by_hand():
    """Ratios 2 and 1/2 of a good response, of which the first is clipped; a third token does not count."""
    new = torch.tensor([[math.log(2.0), -math.log(2.0), 50.0]], requires_grad=True)
    zeros, mask = torch.zeros(1, 3), torch.tensor([[True, True, False]])
    loss = dipo_loss(new, zeros, zeros, torch.tensor([1.0]), mask, 2, 0.2, 0.28, beta=0.5, kl="k1")
    assert loss.item() == pytest.approx(-(1.28 + 0.5) / 2)
    loss.backward()
    assert new.grad[0].tolist() == pytest.approx([0.25, 0.25 - 0.25, 0.0])


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`kl`"):
        DiPOObjective(kl="k2")


@pytest.mark.parametrize(("family", "kl_target"), [("sdar", "ref"), ("llada", "old")])
def test_it_trains(tmp_path, family, kl_target):
    options = {"objective_kwargs": {"kl": "k1", "shrink": 2}, "beta": 0.1, "num_iterations": 2}
    options |= {"max_completion_length": 7, "rounds_per_forward": 8}
    trainer = check_learns(tmp_path, family, "dipo", kl_target=kl_target, **options)
    assert trainer.objective == DiPOObjective(shrink=2, kl="k1")


@FAMILIES
def test_the_rounds_of_the_rollout(tmp_path, family):
    options = {"max_completion_length": 7, "rounds_per_forward": 8}
    trainer, seen = check_ratio_is_one(tmp_path, family, DiPOObjective(), **options)
    for inputs in seen:
        trace = TraceObjective().rounds(inputs.rows)
        assert all(torch.equal(one.masked, two.masked) for one, two in zip(inputs.rounds, trace, strict=True))
    for first, second in zip(seen[::2], seen[1::2], strict=True):  # a mean over the tokens of both
        tokens = sum(one.scored.sum() for one in (first, second))
        loss = sum(trainer.objective.loss(one).loss for one in (first, second)) / 2
        expected = sum((one.advantages[:, None] * one.scored).sum() for one in (first, second)) / tokens
        torch.testing.assert_close(loss, -expected, atol=1e-5, rtol=0)


def test_more_room_above_than_the_config_says():
    ids = torch.ones(2, 3, dtype=torch.long)
    scored = torch.tensor([[True, True, False], [True, False, False]])
    rows, rounds = Rows(ids, ids, ids, ids, Grid(3), scored), [Round(scored, scored)]
    new, old = 0.35 * scored, torch.zeros(2, 3)
    advantages, tokens = torch.tensor([2.0, -1.0]), torch.tensor(3)
    outputs = DiPOObjective().loss(
        LossInputs(rows, rounds, new[None], new, old, None, advantages, tokens, epsilon_low=0.1, epsilon_high=0.3)
    )
    assert outputs.loss.item() == pytest.approx((-2 * 2 * 1.38 + math.exp(0.35)) / 3)
    assert outputs.metrics["ratio/outside"] == 1
