"""ESPO against the published numbers, by hand, and in training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_trl.objectives import Objective
from dllm_trl.objectives.corruptions import spread_counts
from dllm_trl.objectives.espo import ESPOObjective, espo_loss, espo_pair
from dllm_trl.trainers.draws import CountingDraws

from .in_training import cases, check_learns, check_ratio_is_one
from .test_corruptions import make_rows


FAMILIES = pytest.mark.parametrize("family", ["sdar", "llada"])


def reduced(rounds, logps):
    """What an objective makes of log-probabilities `(K, B, R)`."""
    scored = torch.stack([one.scored for one in rounds])
    return Objective.reduce(None, logps.masked_fill(~scored, 0), rounds).sum(1)


def test_counts(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "mask_counts_espo"):
        first, length = torch.tensor([[inputs["k"]]]), torch.tensor([[inputs["target_len"]]])
        assert spread_counts(first, inputs["b"], length, least=0)[0].tolist() == expected, name


def test_elbo(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "espo_elbo"):
        mask, ratio = torch.tensor([inputs["mask"]]), torch.tensor([[inputs["ratio"]]], dtype=torch.double)
        logps = torch.tensor([[inputs["lp_mask"]], [inputs["lp_comp"]]], dtype=torch.double)
        rounds = espo_pair(mask, torch.ones_like(mask), ratio)
        assert reduced(rounds, logps).item() == pytest.approx(expected, rel=1e-6), name


def test_loss(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "espo_loss"):
        keys = ("elbo_new", "elbo_old", "elbo_ref", "adv")
        rows = [torch.tensor(inputs[key], dtype=torch.double) for key in keys]
        options = (inputs.get("eps_low", 0.2), inputs.get("eps_high", 0.2), inputs.get("beta", 0.01))
        assert espo_loss(*rows, inputs["L"], *options).item() == pytest.approx(expected, rel=1e-6), name


def test_by_hand():
    """Three tokens and one that does not count; one masked: the ratio is 1/4, that of the others 3/4 - 1/4."""
    trained = torch.tensor([[True, True, True, False]])
    pair = espo_pair(torch.tensor([[False, True, False, False]]), trained, torch.tensor([[0.25]]))
    assert [one.scored[0].tolist() for one in pair] == [[False, True, False, False], [True, False, True, False]]
    logps = torch.tensor([[[-1.0, -2.0, -4.0, -9.0]], [[-1.0, -2.0, -4.0, -9.0]]])
    assert reduced(pair, logps).item() == pytest.approx((-2 / 0.25 - 5 / 0.5) / 2)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    num_samples=st.integers(1, 4),
    views=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_pairs_are_disjoint_and_complete(lengths, num_samples, views, seed):
    rows = make_rows(lengths, [1] * len(lengths))
    objective = ESPOObjective(num_samples, views)
    rows.draws = objective.draw(rows, CountingDraws(seed, 0))
    for view in range(views):
        rounds = objective.rounds(rows, view)
        assert len(rounds) == 2 * num_samples
        for mask, other in zip(rounds[::2], rounds[1::2], strict=True):
            assert not (mask.scored & other.scored).any() and torch.equal(mask.scored | other.scored, rows.trained)
            assert torch.equal(mask.masked, mask.scored) and torch.equal(other.masked, other.scored)
        assert all(one.loss_weight.isfinite().all() for one in rounds)
        counts = torch.stack([one.scored.sum(1) for one in rounds[::2]])
        for row, length in enumerate(lengths):
            assert counts[:, row].unique().numel() == min(num_samples, length + 1)


def test_the_estimate_is_right_on_average():
    """Where every token has log-probability -1, whatever the context: the counts are uniform over 0 to |o|."""
    rows = make_rows([7] * 8000, [1] * 8000)
    objective = ESPOObjective()
    rows.draws = objective.draw(rows, CountingDraws(0, 0))
    rounds = objective.rounds(rows)
    counts = rounds[0].scored.sum(1)
    assert (torch.bincount(counts) - 1000).abs().max() < 120
    inner = (counts > 0) & (counts < 7)  # at the ends one half is empty, and half of the estimate is missing
    estimate = reduced(rounds, -torch.ones(2, 8000, 9))
    torch.testing.assert_close(estimate[inner], torch.full_like(estimate[inner], -8.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(estimate[~inner], torch.full_like(estimate[~inner], -4.0), rtol=1e-5, atol=0)
    assert abs(estimate.mean() + 7) < 0.1


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"num_views": 1.5}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        ESPOObjective(**options)


@FAMILIES
def test_it_trains(tmp_path, family):
    trainer = check_learns(
        tmp_path,
        family,
        "espo",
        objective_kwargs={"num_samples": 2},
        beta=0.01,
        num_iterations=2,
        max_completion_length=7,
    )
    assert trainer.objective == ESPOObjective(num_samples=2, num_views=2)


@FAMILIES
def test_the_same_masks_for_old_and_new(tmp_path, family):
    trainer, seen = check_ratio_is_one(tmp_path, family, ESPOObjective(1, 2), max_completion_length=5)
    for inputs in seen:
        loss = ESPOObjective().loss(inputs).loss.item()
        assert loss == pytest.approx(-inputs.advantages.mean().item(), abs=1e-4)
    assert not torch.equal(seen[0].rounds[0].masked, trainer.objective.rounds(seen[0].rows, 1)[0].masked)
