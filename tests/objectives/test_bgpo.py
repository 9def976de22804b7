"""BGPO against the published numbers, by hand, and in training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_trl.objectives.bgpo import BGPOObjective, bgpo_loss
from dllm_trl.objectives.corruptions import spread_counts
from dllm_trl.trainers import DiffusionGRPOTrainer
from dllm_trl.trainers.draws import CountingDraws

from ..trainers.test_diffusion_grpo_trainer import make_trainer
from .in_training import cases, check_learns, check_ratio_is_one
from .test_corruptions import make_rows


FAMILIES = pytest.mark.parametrize("family", ["sdar", "llada"])


def test_counts(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "mask_counts_llada"):
        first, length = torch.tensor([[inputs["k"]]]), torch.tensor([[inputs["target_len"]]])
        assert spread_counts(first, inputs["b"], length)[0].tolist() == expected, name


def test_loss(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "bgpo_loss"):
        new, old, advantages = (
            torch.tensor(inputs[key], dtype=torch.double) for key in ("elbo_new", "elbo_old", "adv")
        )
        options = {key: inputs[key] for key in inputs.keys() & {"epsilon_low", "epsilon_high", "dual_clip"}}
        found = bgpo_loss(new.unsqueeze(1), old.unsqueeze(1), advantages, **options).item()
        assert found == pytest.approx(expected, rel=1e-6), name


def test_by_hand():
    """A good response under two corruptions, one of them clipped, and a bad one whose ratios are clipped by 3."""
    new, old = torch.tensor([[-1.0, -1.0], [-1.0, -900.0]]), torch.tensor([[-1.1, -1.5], [-4.0, -3.0]])
    loss = bgpo_loss(new.requires_grad_(), old, torch.tensor([2.0, -0.5]))
    expected = [-2 * 1.1, -2 * 1.2, 3 * 0.5, 0.5 * 0.8]
    assert loss.item() == pytest.approx(sum(expected) / 4)
    loss.backward()
    assert new.grad.tolist() == [[-0.5, 0.0], [0.0, 0.0]]


def test_ratios_beyond_all_numbers_have_no_gradient():
    new = torch.tensor([[0.0]], requires_grad=True)
    loss = bgpo_loss(new, torch.tensor([[-1000.0]]), torch.tensor([-1.0]))
    loss.backward()
    assert loss == 3.0 and new.grad == 0.0


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    num_samples=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_counts_are_exact_and_spread(lengths, num_samples, seed):
    rows = make_rows(lengths, [1] * len(lengths))
    objective = BGPOObjective(num_samples)
    rows.draws = objective.draw(rows, CountingDraws(seed, 0))
    rounds = objective.rounds(rows)
    counts = torch.stack([one.scored.sum(1) for one in rounds])
    for row, length in enumerate(lengths):
        found = counts[:, row]
        assert found.min() >= min(length, 1) and found.max() <= length
        assert found.unique().numel() == min(num_samples, length) if length else found.max() == 0
    elbos = objective.reduce(torch.stack([-2.0 * one.scored for one in rounds]), rounds)
    assert elbos.shape == (len(lengths), num_samples)
    torch.testing.assert_close(elbos, -2.0 * (torch.tensor(lengths) > 0)[:, None].expand_as(elbos))


def test_every_count_is_equally_likely():
    rows = make_rows([7] * 7000, [1] * 7000)
    objective = BGPOObjective(2)
    rows.draws = objective.draw(rows, CountingDraws(0, 0))
    for one in objective.rounds(rows):
        assert (torch.bincount(one.scored.sum(1), minlength=8)[1:] - 1000).abs().max() < 120


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"num_views": 1.5}, {"dual_clip": 1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        BGPOObjective(**options)


def test_there_is_no_kl_term(tmp_path):
    with pytest.raises(ValueError, match="`beta=0.1` would have no effect"):
        make_trainer(tmp_path, trainer_class=DiffusionGRPOTrainer, objective="bgpo", beta=0.1)


@FAMILIES
def test_it_trains(tmp_path, family):
    trainer = check_learns(
        tmp_path, family, "bgpo", objective_kwargs={"num_samples": 3}, num_iterations=2, max_completion_length=7
    )
    assert trainer.objective == BGPOObjective(num_samples=3, num_views=2)


@FAMILIES
def test_the_same_masks_for_old_and_new(tmp_path, family):
    """Old ones are those of each corruption, not of their mean."""
    _, seen = check_ratio_is_one(tmp_path, family, BGPOObjective(2, num_views=2), max_completion_length=5)
    for inputs in seen:
        first, second = inputs.old_logps.unbind(1)
        assert (first - second).abs().max() > 1e-3
        loss = BGPOObjective().loss(inputs).loss.item()
        assert loss == pytest.approx(-inputs.advantages.mean().item(), abs=1e-4)
