"""LightningRL against the numbers of the public code, by hand, and in training."""

import math

import pytest
import torch

from dllm_trl.objectives.lightning_rl import LightningRLObjective
from dllm_trl.objectives.lightning_terms import kept_advantages, lightning_loss, speed_rewards, step_weights
from dllm_trl.objectives.trace import TraceObjective

from ..trainers.test_tracerl_trainer import logged
from .in_training import cases, check_learns, check_ratio_is_one, trainer_of


FAMILIES = pytest.mark.parametrize("family", ["sdar", "llada"])
# So that the model decides how many tokens a step commits
UNEVEN = {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.1, "denoising_steps": 4}


def right(completions, **kwargs):
    """Some of the responses of a random model."""
    return [float(len(text) % 2) for text in completions]


def test_group(oracles_dir):
    options = {"acc_norm": "normalize_correct", "drop_all_wrong": "drop_all_wrong"}
    for inputs, expected, name in cases(oracles_dir, "lightningrl_group"):
        facts = (torch.tensor([inputs[key]]) for key in ("correct", "lengths", "forwards"))
        given = {ours: inputs[theirs] for theirs, ours in options.items() if theirs in inputs}
        assert inputs.keys() <= {"correct", "lengths", "forwards", "max_tokens", *options}
        rewards, correct, speed, kept = speed_rewards(*facts, inputs["max_tokens"], **given)
        assert kept.tolist() == [expected["kept"]] and correct[0].tolist() == expected["correct"], name
        assert speed[0].tolist() == pytest.approx(expected["tokens_per_forward"], rel=1e-6), name
        assert rewards[0].tolist() == pytest.approx(expected["rewards"], rel=1e-6), name


def test_advantages(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "lightningrl_advantages"):
        groups = torch.tensor([i for i, group in enumerate(inputs["groups"]) for _ in group])
        rewards = torch.tensor([reward for group in inputs["groups"] for reward in group], dtype=torch.double)
        flat = [value for group in expected for value in group]
        # A dropped response more changes nothing
        for reward, own in (([], []), ([9.0], [0])):
            all_rewards = torch.cat([rewards, torch.tensor(reward, dtype=torch.double)])
            all_groups = torch.cat([groups, torch.tensor(own, dtype=torch.long)])
            ours = kept_advantages(
                all_rewards, torch.arange(len(all_rewards)) < len(rewards), all_groups, inputs["mode"]
            )
            assert ours.tolist() == pytest.approx([*flat, *[0.0] * len(own)], rel=1e-6, abs=1e-9), name


def test_loss(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "lightningrl_loss"):
        logps = (torch.tensor(inputs[f"logp_{key}"], dtype=torch.double) for key in ("new", "old", "ref"))
        worth, scored = torch.tensor(inputs["adv"], dtype=torch.double)[:, None], torch.tensor(inputs["mask"])
        correct, kept = torch.tensor(inputs["correct"]), torch.ones(len(scored), dtype=torch.bool)
        weights = step_weights(correct, kept, scored.sum(1))
        clip, lengths = (inputs["eps"], inputs["eps_high"]), torch.tensor(inputs["lengths"])
        terms = lightning_loss(
            *logps, worth, scored, lengths, weights, clip, inputs["beta"], inputs["kl"], inputs["nll_weight"]
        )
        found = {"policy": terms[0].item(), "kl": terms[1].item(), "nll": terms[2].item(), "loss": sum(terms).item()}
        assert found == pytest.approx(expected, rel=1e-6), name


def test_by_hand():
    """
    Two groups of two. First: a right response of 8 tokens in 2 forwards and a wrong one of 6 in 6, z-scores 1 and -1
    each. Second: both right, but one reached the limit of 20 - 5; equally fast, so it is dropped.
    """
    correct = torch.tensor([[True, False], [True, True]])
    lengths, forwards = torch.tensor([[8, 6], [4, 15]]), torch.tensor([[2, 6], [4, 15]])
    rewards, correct, speed, kept = speed_rewards(correct, lengths, forwards, limit=20)
    assert rewards.tolist() == [[2.0, -2.0], [1.0, -1.0]] and correct.tolist() == [[True, False], [True, False]]
    assert speed.tolist() == [[4.0, 1.0], [1.0, 1.0]] and kept.tolist() == [True, False]
    counted, groups = kept.repeat_interleave(2), torch.tensor([0, 0, 1, 1])
    advantages = kept_advantages(rewards.flatten(), counted, groups)
    assert advantages.tolist() == pytest.approx([2 / math.sqrt(8), -2 / math.sqrt(8), 0, 0])
    weights = step_weights(correct.flatten(), counted, lengths.flatten())
    # Of four rows two count, with 14 tokens, 8 of them right
    assert weights.tolist() == [pytest.approx(row) for row in [[2, 4 / 14, 4 / 8], [2, 4 / 14, 0], [0] * 3, [0] * 3]]
    none = step_weights(torch.tensor([False, False]), torch.tensor([False, False]), torch.tensor([3, 4]))
    assert none.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("options", [{"scale": "group"}, {"kl": "k4"}, {"slack": -1}, {"nll_weight": "x"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        LightningRLObjective(**options)


@FAMILIES
def test_it_trains(tmp_path, family):
    options = {"beta": 0.04, "num_iterations": 2, "reward_funcs": right, "objective_kwargs": {"slack": 0}}
    trainer = check_learns(tmp_path, family, "lightning_rl", **options, **UNEVEN)
    assert trainer.objective == LightningRLObjective(slack=0)
    assert isinstance(trainer.objective, TraceObjective) and trainer.objective.replays_rollout
    logs = [logged(trainer, name) for name in ("loss/policy", "loss/kl", "loss/likelihood", "loss")]
    assert all(sum(terms) == pytest.approx(loss, abs=1e-4) for *terms, loss in zip(*logs, strict=True))
    assert 0 <= logged(trainer, "frac_groups_dropped")[0] < 1


@FAMILIES
def test_the_rounds_of_the_trace_and_what_the_loss_knows(tmp_path, family):
    options = {"reward_funcs": right, "max_completion_length": 12, **UNEVEN}
    trainer, seen = check_ratio_is_one(tmp_path, family, LightningRLObjective(slack=0), **options)
    weights = torch.cat([inputs.notes["weights"] for inputs in seen[:2]])  # of all eight rows
    assert weights.shape == (8, 3)
    lengths = torch.cat([inputs.scored.sum(1) for inputs in seen[:2]]).float()
    kept = lengths > 0
    assert kept.any() and torch.equal(weights[:, 0] > 0, kept)
    torch.testing.assert_close((weights[:, 1] * lengths).mean(), torch.tensor(1.0))
    torch.testing.assert_close((weights[:, 2] * lengths).mean(), torch.tensor(1.0))
    advantages = torch.cat([inputs.advantages for inputs in seen[:2]])[kept]
    torch.testing.assert_close(advantages.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages.std(), torch.tensor(1.0))


def test_where_all_are_equally_fast_there_is_nothing_to_learn(tmp_path, caplog):
    """Two steps per block, whatever the model is sure of; the trainer says so."""
    trainer = trainer_of(tmp_path, "sdar", "lightning_rl", reward_funcs=right, max_completion_length=4, max_steps=1)
    trainer.train()
    assert logged(trainer, "loss") == [0.0] and "what the objective asks of them" in caplog.text
