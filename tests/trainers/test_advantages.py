"""What responses are worth: every published advantage through the trainer's own code."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_trl.objectives import Outcome
from dllm_trl.trainers import DiffusionGRPOConfig
from dllm_trl.trainers.advantages import (
    SCALES,
    GroupEstimator,
    in_accuracy_range,
    is_overlong,
    leave_one_out,
    population_z_score,
)

from .test_diffusion_grpo_trainer import make_trainer, roll_out


NAN = float("nan")
GROUPS = st.lists(st.floats(-5, 5), min_size=2, max_size=9)


def cases(oracles_dir, name):
    found = json.loads((oracles_dir / f"{name}.json").read_text())["cases"]
    assert found
    return [(SimpleNamespace(**case["inputs"]), case["expected"]) for case in found]


def assert_equal(found, expected):
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12)


def test_leave_one_out(oracles_dir):
    for inputs, expected in cases(oracles_dir, "adv_leave_one_out"):
        rewards = torch.tensor(inputs.xs, dtype=torch.float64)
        assert_equal(leave_one_out(rewards, len(rewards), scale=getattr(inputs, "scale", False)), expected)


def test_population_z_score(oracles_dir):
    for inputs, expected in cases(oracles_dir, "adv_zscore_population"):
        rewards = torch.tensor(inputs.xs, dtype=torch.float64)
        assert_equal(population_z_score(rewards, len(rewards)), expected)


def test_groups_of_programs(oracles_dir):
    for inputs, (kept, expected) in cases(oracles_dir, "seed_code_group"):
        rewards = torch.tensor(inputs.tests_passed, dtype=torch.float64)
        found = population_z_score(rewards, len(rewards))
        assert_equal(found, expected)
        assert found.any().item() == kept


def test_groups_of_math_problems(oracles_dir):
    for inputs, (kept, corrected, expected) in cases(oracles_dir, "seed_math_group"):
        correct, lengths = torch.tensor(inputs.correct), torch.tensor(inputs.lengths)
        right = correct & ~is_overlong(lengths, torch.ones_like(correct), inputs.max_tokens, 5)
        assert right.tolist() == corrected
        assert in_accuracy_range(right.double(), len(right), 0.2, 0.8).all().item() == kept
        assert_equal(population_z_score(right.double(), len(right)), expected)


NAMES = {
    "adv_zscore_population": "population",
    "adv_trl_group": "group",
    "adv_grpo_mean_only": "none",
    "adv_leave_one_out": "leave_one_out",
}


@pytest.mark.parametrize("fixture", NAMES)
def test_every_case_through_the_trainer(tmp_path, oracles_dir, fixture):
    """Beside a group of which one response alone has a reward."""
    for inputs, expected in cases(oracles_dir, fixture):
        size = len(inputs.xs)
        rewards = inputs.xs + [None] * (size - 1) + [1.0]
        scale = "leave_one_out_scaled" if getattr(inputs, "scale", False) else NAMES[fixture]
        trainer = make_trainer(
            tmp_path,
            scale_rewards=scale,
            num_generations=size,
            per_device_train_batch_size=2 * size,
            max_completion_length=4,
            reward_funcs=lambda completions, rewards=rewards, **kwargs: rewards,
        )
        found = roll_out(trainer)["advantages"]
        # Rewards are float32 here: differences of some lose digits
        exact = torch.tensor(inputs.xs).double().tolist() == inputs.xs
        torch.testing.assert_close(found[:size], torch.tensor(expected), rtol=1e-6 if exact else 1e-3, atol=1e-6)
        assert (found[size:] == 0).all()


@given(GROUPS)
@settings(max_examples=60, deadline=None)
def test_leave_one_out_is_what_is_centred_and_scaled(rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    count = len(rewards)
    expected = count / (count - 1) * (rewards - rewards.mean())
    torch.testing.assert_close(leave_one_out(rewards, count), expected, rtol=1e-9, atol=1e-12)
    others = torch.stack([rewards[torch.arange(count) != i].mean() for i in range(count)])
    torch.testing.assert_close(leave_one_out(rewards, count), rewards - others, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCALES)
@given(rewards=GROUPS, data=st.data())
@settings(max_examples=40, deadline=None)
def test_what_has_no_reward_is_left_out(name, rewards, data):
    """It is worth nothing, and its siblings are worth what they are without it; groups are on their own."""
    scale = SCALES[name]
    rewards = torch.tensor(rewards, dtype=torch.float64)
    place = data.draw(st.integers(0, len(rewards)))
    holed = torch.cat([rewards[:place], torch.tensor([NAN], dtype=torch.float64), rewards[place:]])
    other = torch.cat([torch.full((len(rewards),), NAN, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    found = scale(torch.cat([holed, other]), len(holed))
    assert found[place] == 0 and (found[len(holed) :] == 0).all()
    mine = torch.cat([found[:place], found[place + 1 : len(holed)]])
    torch.testing.assert_close(mine, scale(rewards, len(rewards)), rtol=1e-9, atol=1e-12)


def test_dropped_groups_and_weighted_rewards():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, NAN], [1.0, 4.0]])
    total = (rewards * torch.tensor([1.0, 0.5])).nansum(1)
    outcome = Outcome(rewards, total, torch.zeros(4), 2, slice(0, 4), None)
    advantage = GroupEstimator("leave_one_out", (0.2, 0.8))(outcome)
    assert advantage.values.tolist() == [0, 0, 0, 0] and advantage.kept.tolist() == [True, True, False, False]
    outcome.total = torch.tensor([1.0, 3.0, 1.0, 4.0])
    advantage = GroupEstimator("leave_one_out", (0.2, 0.8))(outcome)
    assert advantage.values.tolist() == [-2, 2, 0, 0]
    assert GroupEstimator("leave_one_out")(outcome).values.tolist() == [-2, 2, -3, 3]


def test_weights_of_rewards_through_the_trainer(tmp_path):
    trainer = make_trainer(
        tmp_path,
        scale_rewards="leave_one_out",
        reward_weights=[1.0, 0.5],
        accuracy_range=[0.2, 0.8],
        reward_funcs=[
            lambda completions, **kwargs: [1.0, 0.0, 0.0, 0.0] + [0.0] * 4,
            lambda completions, **kwargs: [None, 2.0, 0.0, 0.0] + [1.0, 0.0, 0.0, 0.0],
        ],
    )
    found = roll_out(trainer)["advantages"]
    expected = torch.tensor([1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(found[:4], 4 / 3 * (expected - expected.mean()))
    assert (found[4:] == 0).all()  # all wrong: dropped


@pytest.mark.parametrize("name", SCALES)
def test_rewards_are_added_before_they_are_compared(tmp_path, name):
    with pytest.raises(ValueError, match=f"`scale_rewards='{name}'` needs `multi_objective_aggregation"):
        DiffusionGRPOConfig(
            str(tmp_path), use_cpu=True, scale_rewards=name, multi_objective_aggregation="normalize_then_sum"
        )
