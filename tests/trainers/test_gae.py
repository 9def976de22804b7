"""Advantages over the steps of a trace and the critic's loss: against the fixtures, by hand, and what must hold."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_trl.trainers.gae import outcome_token_rewards, step_gae, value_loss


def cases(oracles_dir, name):
    return json.loads((oracles_dir / f"{name}.json").read_text())["cases"]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found, double(expected), rtol=1e-9, atol=1e-12)


def test_fixtures_of_step_gae(oracles_dir):
    """All cases at once as ragged rows of one batch, too."""
    given = cases(oracles_dir, "step_gae")
    assert len(given) >= 9
    for case in given:
        inputs, expected = case["inputs"], case["expected"]
        step_map = torch.tensor([inputs["step_map"]])
        trained = torch.zeros_like(step_map, dtype=torch.bool)
        trained[0, inputs["trainable"]] = True
        rewards, values = (double([inputs[name]]) for name in ("token_rewards", "token_values"))
        options = {"gamma": inputs["gamma"], "gae_lambda": inputs["lam"]}
        options |= {"token_reward": inputs.get("token_reward", "token")}
        found = step_gae(step_map, trained, rewards, values, **options)
        for name in ("returns", "advantages", "step_rewards", "step_values", "step_returns", "step_advantages"):
            close(getattr(found, name)[0], expected[name])
        assert found.step_ids[0].tolist() == expected["step_ids"]
        # Beside a row without any token, and one with more steps
        wide = step_map.size(1)
        more = step_gae(
            torch.cat([step_map, step_map, torch.arange(wide)[None]]),
            torch.cat([trained, torch.zeros_like(trained), torch.ones_like(trained)]),
            rewards.expand(3, -1),
            values.expand(3, -1),
            **options,
        )
        close(more.advantages[0], expected["advantages"])
        close(more.returns[0], expected["returns"])
        assert (more.advantages[1] == 0).all() and (more.step_ids[1] == -1).all() and more.step_ids.size(1) == wide


def test_fixtures_of_the_value_loss(oracles_dir):
    given = cases(oracles_dir, "value_loss")
    assert len(given) >= 4
    for case in given:
        inputs = case["inputs"]
        numbers = (double(inputs[name]) for name in ("values", "old_values", "returns"))
        options = {"norm": inputs["norm"], "response_length": inputs["response_len"], "epsilon": inputs["eps"]}
        found = value_loss(*numbers, torch.tensor(inputs["mask"]), **options)
        close(found, case["expected"])


def test_by_hand():
    step_map, trained = torch.tensor([[0, 3, 3, 1]]), torch.tensor([[True, True, True, False]])
    rewards = outcome_token_rewards(torch.tensor([2.0]), step_map, trained)
    assert rewards.tolist() == [[0, 2, 2, 0]]
    values = torch.tensor([[0.5, 1.0, 2.0, 9.0]])
    found = step_gae(step_map, trained, rewards, values, gamma=0.5, gae_lambda=0.5)
    # Last step: V* = 1.5, A* = 2 - 1.5; before: 0 - 0.5 + 0.5 * 1.5 + 0.25 * 0.5
    assert found.step_ids.tolist() == [[0, 3]]
    assert found.advantages.tolist() == [[0.375, 1.0, 0.0, 0.0]]
    assert found.returns.tolist() == [[1.0, 2.0, 2.0, 0.0]]
    # 0.5 * max((1 - 0)^2, (0.2 - 0)^2) and 0.5 * max((0.1 - 1)^2, (0.1 - 1)^2)
    new, old, returns = torch.tensor([[1.0, 0.1]]), torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
    loss = value_loss(new, old, returns, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.tensor((0.5 + 0.405) / 2))


@st.composite
def traces(draw):
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))

    def matrix(of):
        return torch.tensor([[draw(of) for _ in range(width)] for _ in range(rows)])

    step_map, trained = matrix(st.integers(-1, 6)), matrix(st.booleans())
    rewards = torch.tensor([draw(st.floats(-2, 2)) for _ in range(rows)])
    return step_map, trained & (step_map >= 0), matrix(st.floats(-2, 2)), rewards


@settings(max_examples=100, deadline=None)
@given(traces())
def test_without_discount_the_return_is_the_reward(trace):
    """gamma = lambda = 1: R = r and A = r - V at every trained token."""
    step_map, trained, values, rewards = trace
    found = step_gae(step_map, trained, outcome_token_rewards(rewards, step_map, trained), values)
    expected = rewards.unsqueeze(1) * trained
    torch.testing.assert_close(found.returns, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.advantages, (rewards.unsqueeze(1) - values) * trained, atol=1e-5, rtol=0)


def test_names_are_checked():
    step_map, trained = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="`token_reward` must be"):
        step_gae(step_map, trained, torch.zeros(1, 2), torch.zeros(1, 2), token_reward="mean")
    with pytest.raises(ValueError, match="`norm` must be one of"):
        value_loss(*(torch.zeros(1, 2) for _ in range(3)), trained, norm="row")
