"""SPG against the published numbers, by hand, and in training."""

import math

import pytest
import torch

from dllm_trl.objectives.sandwich import spg_bounds, spg_sequence_logp
from dllm_trl.objectives.spg import SPGObjective, spg_loss
from dllm_trl.trainers import DiffusionGRPOTrainer

from ..trainers.test_diffusion_grpo_trainer import make_trainer, roll_out
from .in_training import cases, check_learns, losses_seen


FAMILIES = pytest.mark.parametrize("family", ["sdar", "llada"])


def test_bounds(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "spg_sequence_logp"):
        logps = torch.tensor(inputs["logp"], dtype=torch.double).unsqueeze(1)
        masks, completion = torch.tensor(inputs["mask"]).unsqueeze(1), torch.tensor([inputs["completion"]])
        options = {key: inputs[key] for key in inputs.keys() & {"mode", "eubo_beta", "mix_weight"}}
        found = spg_sequence_logp(logps, masks, completion, torch.tensor([inputs["positive"]]), **options)
        assert found.item() == pytest.approx(expected, rel=1e-6), name


def test_loss(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "spg_loss"):
        rows = [torch.tensor(inputs[key], dtype=torch.double) for key in ("seq_logp", "adv", "lengths")]
        assert spg_loss(*rows, rows[2].sum()).item() == pytest.approx(expected, rel=1e-6), name


def test_by_hand():
    """Of three tokens the third does not count, the second is masked by the second of two corruptions only."""
    logps = torch.tensor([[[-1.0, 0.0, -9.0]], [[-2.0, -3.0, -9.0]]], requires_grad=True)
    masks = torch.tensor([[[True, False, True]], [[True, True, True]]])
    elbo, eubo = spg_bounds(logps, masks, torch.tensor([[1, 1, 0]]), eubo_beta=2.0)
    assert elbo.item() == pytest.approx((-1 - 2.5) / 2)
    first, second = math.log((math.exp(-2) / 0.5 + math.exp(-4) / 1) / 2), math.log(math.exp(-6) / 1 / 2)
    assert eubo.item() == pytest.approx((first + second) / 2 / 2)
    (elbo + eubo).backward()
    assert logps.grad.isfinite().all() and (logps.grad[:, 0, 2] == 0).all() and logps.grad[0, 0, 1] == 0


def test_likelihoods_that_underflow_and_rows_without_tokens():
    logps = torch.tensor([[[-200.0, -300.0], [-1.0, -1.0]]], requires_grad=True)
    masks = torch.ones(1, 2, 2, dtype=torch.bool)
    elbo, eubo = spg_bounds(logps, masks, torch.tensor([[1, 1], [0, 0]]))
    assert elbo.tolist() == eubo.tolist() == [-250.0, 0.0]  # one corruption that masks everything: the two are equal
    eubo.sum().backward()
    assert torch.equal(logps.grad, torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]))


def test_the_upper_bound_is_above_the_lower():
    """For beta -> 1 and enough corruptions: by Jensen's inequality, where each token is masked equally often."""
    logps = -torch.rand(6, 40, 5, generator=torch.Generator().manual_seed(0)) * 4
    elbo, eubo = spg_bounds(logps, torch.ones(6, 40, 5, dtype=torch.bool), torch.ones(40, 5), 1.0)
    assert (eubo > elbo).all()


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"num_views": 1.5}, {"mode": "upper"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        SPGObjective(**options)


def test_there_is_no_kl_term(tmp_path):
    with pytest.raises(ValueError, match="`beta=0.1` would have no effect"):
        make_trainer(tmp_path, trainer_class=DiffusionGRPOTrainer, objective="spg", beta=0.1)


@FAMILIES
def test_it_trains(tmp_path, family):
    trainer = check_learns(
        tmp_path, family, "spg", objective_kwargs={"num_samples": 3}, num_iterations=2, max_completion_length=7
    )
    assert trainer.objective == SPGObjective(num_samples=3, num_views=2)
    assert "old_logps" not in roll_out(trainer)  # which nothing would read


@FAMILIES
def test_a_loss_is_that_of_its_rows(tmp_path, family):
    """By loops over the rows, from what a loss is given; the two micro-batches of a step share its tokens."""
    trainer, seen = losses_seen(tmp_path, family, SPGObjective(num_views=2), max_completion_length=7)
    assert not torch.equal(seen[0].rounds[0].masked, trainer.objective.rounds(seen[0].rows, 1)[0].masked)
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        total = sum(one.rows.trained.sum() for one in (first, second))
        assert first.num_trained * 2 == total == second.num_trained * 2
        loss = sum(trainer.objective.loss(one).loss for one in (first, second)) / 2
        expected = 0.0
        for inputs in (first, second):
            assert len(inputs.rounds) == 2 and (inputs.advantages <= 0).any() and (inputs.advantages > 0).any()
            for row, advantage in enumerate(inputs.advantages):
                length = inputs.rows.trained[row].sum()
                means = [lp[row][one.scored[row]].mean() for lp, one in zip(inputs.token_logps, inputs.rounds)]
                bound = torch.stack(means).mean()
                if advantage <= 0:
                    levels = [one.scored[row].sum() / length for one in inputs.rounds]
                    tokens = []
                    for column in range(inputs.scored.size(1)):
                        terms = [
                            (1.5 * lp[row, column]).exp() / level
                            for lp, one, level in zip(inputs.token_logps, inputs.rounds, levels)
                            if one.scored[row, column]
                        ]
                        tokens += [(sum(terms) / 2).log() / 1.5] if terms else []
                    bound = (bound + torch.stack(tokens).mean()) / 2
                expected = expected - advantage * bound * length / total
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
