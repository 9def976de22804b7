"""GDPO against the numbers of the public code, by hand, and in training."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_trl.objectives.gdpo import GDPOObjective, gdpo_loss, gdpo_mask, gdpo_round
from dllm_trl.objectives.quadrature import gauss_legendre
from dllm_trl.types import Grid, Rows

from .in_training import cases, check_learns, check_ratio_is_one, exact


FAMILIES = pytest.mark.parametrize("family", ["sdar", "llada"])


def rows_of(lengths, width, draws=None):
    """Responses of these lengths after prompts of one token."""
    trained = torch.arange(width) < torch.tensor(lengths)[:, None]
    ones, prompt = torch.ones_like(trained).long(), torch.ones(len(lengths), 1, dtype=torch.long)
    return Rows(prompt, prompt, ones, ones, Grid(4), trained, draws=draws or {})


def numbers_of(order):
    """Numbers that rank the tokens in this order."""
    return torch.tensor(order).argsort().float()[None] / len(order)


def test_quadrature(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "gdpo_quadrature"):
        points, weights = zip(*gauss_legendre(inputs["n"]), strict=True)
        assert points == pytest.approx(expected["points"], rel=1e-12), name
        assert weights == pytest.approx(expected["weights"], rel=1e-12), name


def test_the_middle_point_is_exactly_a_half():
    """Of an even number of tokens it masks exactly half."""
    assert all(gauss_legendre(n)[n // 2][0] == 0.5 for n in range(1, 12, 2))


def test_masks(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "gdpo_masks"):
        trained = torch.ones(1, inputs["length"], dtype=torch.bool)
        for (point, _), orders, masks in zip(gauss_legendre(inputs["n"]), inputs["perms"], expected, strict=True):
            ours = [gdpo_mask(numbers_of(order), trained, point, inputs["min_count"])[0].tolist() for order in orders]
            assert ours == masks, name


def test_elbo(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "gdpo_elbo"):
        logps, masks = exact(inputs["lp"]), exact(inputs["mask"])
        objective = GDPOObjective(inputs["n"], masks.size(1), inputs["weight"])
        lengths = torch.tensor([masks.size(2)])
        rounds = [
            gdpo_round(mask[None], lengths, point, share / masks.size(1), inputs["weight"])
            for (point, share), draws in zip(gauss_legendre(inputs["n"]), masks, strict=True)
            for mask in draws
        ]
        scored = logps.flatten(0, 1)[:, None].masked_fill(~masks.flatten(0, 1)[:, None], 0)
        assert objective.reduce(scored, rounds).sum().item() == pytest.approx(expected, rel=1e-6), name


def test_loss(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "gdpo_loss"):
        rows = [exact(inputs[key]) for key in ("elbo_new", "elbo_old", "elbo_ref", "adv", "lengths")]
        options = (inputs["eps"], inputs["eps"], inputs["beta"], inputs.get("kl_norm", "none"))
        assert gdpo_loss(*rows, *options).item() == pytest.approx(expected, rel=1e-6), name


def test_by_hand():
    """
    Two points of a response of four tokens, each of log-probability -1: t = 0.2113 masks one of them, t = 0.7887
    three. By their number each estimates E = -4; by 1/t the first is -1 / 0.2113 and the second -3 / 0.7887, halved.
    """
    numbers = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    rows = rows_of([4], 4, {"mask0": numbers, "mask1": numbers})
    for weight, expected in (("count", -4.0), ("t", -0.5 / 0.2113248654 - 1.5 / 0.7886751346)):
        objective = GDPOObjective(n=2, weight=weight)
        rounds = objective.rounds(rows)
        assert [r.masked.tolist() for r in rounds] == [[[False, True, False, False]], [[False, True, True, True]]]
        logps = -torch.stack([r.scored.float() for r in rounds])
        assert objective.reduce(logps, rounds).sum().item() == pytest.approx(expected)
    # A ratio of exp(0.5 / 4), within 1.2; one of exp(8 / 4), beyond it; and for a bad response below 0.8
    elbo, old, worth = torch.tensor([-3.5, 4.0, -8.0]), torch.tensor([-4.0, -4.0, 0.0]), torch.tensor([1.0, 1.0, -1.0])
    loss = gdpo_loss(elbo, old, None, worth, torch.tensor([4, 4, 4]), 0.2, 0.2)
    assert loss.item() == pytest.approx(-(math.exp(0.125) + 1.2 - 0.8) / 3)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 3), st.data())
def test_masks_are_as_many_as_the_points_say(lengths, n, num_samples, data):
    """Whatever is drawn, for each row as if it were alone; a response without a token is left alone."""
    seed = data.draw(st.integers(0, 1000))
    width = max(*lengths, 1)
    draws = {
        f"mask{i}": torch.rand(len(lengths), width, generator=torch.Generator().manual_seed(seed + i))
        for i in range(n * num_samples)
    }
    rounds = GDPOObjective(n, num_samples).rounds(rows_of(lengths, width, draws))
    assert len(rounds) == n * num_samples
    for i, round_ in enumerate(rounds):
        point = gauss_legendre(n)[i // num_samples][0]
        counts = [min(max(math.floor(point * length), 1), length) for length in lengths]
        assert round_.masked.sum(1).tolist() == counts and torch.equal(round_.masked, round_.scored)
        assert not (round_.masked & (torch.arange(width) >= torch.tensor(lengths)[:, None])).any()
    # The weights of a draw add up to its share of the tokens: the bound of a uniform model is exact
    total = sum((r.scored * r.loss_weight).sum(1) for r in rounds)
    torch.testing.assert_close(total, torch.tensor(lengths).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"n": 0}, {"num_samples": 1.5}, {"weight": "1/t"}, {"kl_norm": None}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        GDPOObjective(**options)


@FAMILIES
def test_it_trains(tmp_path, family):
    trainer = check_learns(tmp_path, family, "gdpo", objective_kwargs={"n": 2}, beta=0.04, num_iterations=2)
    assert trainer.objective == GDPOObjective(n=2)


@FAMILIES
def test_the_same_masks_for_old_and_new(tmp_path, family):
    _, seen = check_ratio_is_one(tmp_path, family, GDPOObjective(num_samples=2))
    assert len(seen[0].rounds) == 6
