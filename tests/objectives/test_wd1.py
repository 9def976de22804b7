"""wd1 against the published numbers, by hand, and in training."""

import math

import pytest
import torch

from dllm_trl.objectives.wd1 import WD1Objective, wd1_loss, wd1_weights
from dllm_trl.trainers import DiffusionGRPOTrainer
from dllm_trl.types import Rows

from ..trainers.test_diffusion_grpo_trainer import make_trainer, roll_out
from ..trainers.tiny_rl import letter_reward
from .in_training import cases, check_learns, losses_seen


FAMILIES = pytest.mark.parametrize("family", ["sdar", "llada"])


def test_loss(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "wd1_loss"):
        logps, advantages = (torch.tensor(inputs[key], dtype=torch.double) for key in ("token_logps", "adv"))
        weights = wd1_weights(advantages, torch.ones(len(advantages), dtype=torch.bool))
        found = wd1_loss(weights, logps, torch.tensor(inputs["completion_mask"])).item()
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-12), name


def test_by_hand():
    """The third row does not count."""
    weights = wd1_weights(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([True, True, False]))
    share = math.e / (math.e + 1)
    assert weights.tolist() == pytest.approx([2 * share - 1, 1 - 2 * share, 0])
    assert wd1_weights(torch.ones(2), torch.zeros(2, dtype=torch.bool)).tolist() == [0, 0]


def test_there_is_no_kl_term(tmp_path):
    with pytest.raises(ValueError, match="`beta=0.1` would have no effect"):
        make_trainer(tmp_path, trainer_class=DiffusionGRPOTrainer, objective="wd1", beta=0.1)


@FAMILIES
def test_it_trains(tmp_path, family):
    trainer = check_learns(tmp_path, family, "wd1", num_iterations=2, scale_rewards="none", max_completion_length=7)
    assert trainer.objective == WD1Objective(num_views=2)
    assert "old_logps" not in roll_out(trainer)


@FAMILIES
def test_a_step_is_the_sum_over_its_rollout(tmp_path, family):
    """However it is split: the mean over rows and micro-batches, of weights times their number."""
    trainer, seen = losses_seen(
        tmp_path, family, WD1Objective(num_views=2), scale_rewards="none", max_completion_length=7
    )
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        loss = sum(trainer.objective.loss(one).loss for one in (first, second)) / 2
        weights = torch.cat([one.advantages for one in (first, second)]) / 8
        sums = torch.cat([(one.token_logps[0] * one.rows.trained).sum(1) for one in (first, second)])
        torch.testing.assert_close(loss, -(weights * sums).sum())
        assert weights.sum().abs() < 1e-6 and weights.abs().max() > 1e-3
        for one in (first, second):
            (only,) = one.rounds
            assert torch.equal(only.masked, one.rows.canvas_mask.bool()) and torch.equal(only.scored, one.rows.trained)


def some_reward(completions, **kwargs):
    """None for the first response, and a group of equal ones, which is dropped."""
    rewards = letter_reward(completions)
    return [None, *[float(reward > 0.5) for reward in rewards[1:4]], *([1.0] * 4)]


def test_rows_that_do_not_count_have_no_weight(tmp_path):
    options = {"objective": "wd1", "scale_rewards": "none", "accuracy_range": [0.1, 0.9]}
    trainer = make_trainer(tmp_path, trainer_class=DiffusionGRPOTrainer, reward_funcs=some_reward, **options)
    batch = roll_out(trainer)
    rewards = batch["advantages"]
    rows = Rows.from_batch(batch, trainer.grid)
    assert rows.trained.any(1).tolist() == [True] * 4 + [False] * 4 and rewards[0] == 0
    assert (rewards[4:] == 0).all() and (rewards[1:4] != 0).all() and rewards.sum().abs() < 1e-5
    centred = wd1_weights(rewards_of(trainer), torch.tensor([False] + [True] * 3))
    torch.testing.assert_close(rewards[:4], centred * 8)


def rewards_of(trainer):
    """Advantages of the first group, from what was logged of it."""
    rewards = torch.tensor(list(trainer._logs["rewards"]["some_reward"])[:4])
    return (rewards - rewards.nanmean()).nan_to_num()
