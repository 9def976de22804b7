"""The seams carry what is still to come: each sketched on public names, in a few lines."""

import math
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch

from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from dllm_trl.objectives import LossOutputs, Objective
from dllm_trl.objectives.random_mask import RandomMaskObjective
from dllm_trl.objectives.trace import TraceObjective
from dllm_trl.scoring import Scorer
from dllm_trl.trainers import DiffusionGRPOTrainer
from dllm_trl.trainers.advantages import Advantage
from dllm_trl.trainers.draws import CountingDraws
from dllm_trl.types import Grid, Round, Rows

from .test_diffusion_grpo_trainer import make_trainer, roll_out
from .test_tracerl_trainer import changed, logged, weights
from .tiny_rl import make_model, rows_of


KINDS = pytest.mark.parametrize("family", ["sdar", "llada"])


@dataclass
class CriticEstimator:
    """Advantages over trace steps (GAE with gamma = lambda = 1: reward minus what the critic expects of a step)."""

    critic: torch.nn.Module
    scorer: Scorer

    def __call__(self, outcome):
        rows, rounds = outcome.rows, TraceObjective().rounds(outcome.rows)
        with torch.no_grad():
            values = self.scorer(self.critic, rows, rounds).dense("values").sum(0)  # (B, R)
        rewards = outcome.total[outcome.mine]
        advantages = (rewards.unsqueeze(1) - values) * rows.trained
        return Advantage(advantages, torch.ones_like(outcome.total, dtype=torch.bool))


@KINDS
def test_a_critic_with_gae(tmp_path, family):
    critic = make_model(family, seed=1).eval()
    torch.manual_seed(0)
    critic.lm_head = torch.nn.Linear(critic.config.hidden_size, 1, bias=False)
    scorer = Scorer(mask_token_id=2, logit_shift=critic.config.logit_shift, head="value")
    estimator = CriticEstimator(critic, scorer)
    trainer = make_trainer(tmp_path, make_model(family), estimator=estimator, max_steps=1)
    batch = roll_out(trainer)
    rows = rows_of(trainer, batch)
    assert batch["advantages"].shape == rows.trained.shape and batch["advantages"][rows.trained].unique().numel() > 8
    before = weights(trainer.model)
    trainer.train()
    assert changed(trainer, before)


@dataclass
class TwoViews(Objective):
    """Random masking: each of two views masks half of a response at random, each update takes one."""

    num_views: int = 2

    def draw(self, rows, random):
        return {f"view{view}": random.uniform(rows.trained) for view in range(self.num_views)}

    def rounds(self, rows, view=0):
        masked = rows.trained & (rows.draws[f"view{view}"] < 0.5)
        return [Round(masked, masked)]


@KINDS
def test_masks_drawn_at_random_in_two_views(tmp_path, family):
    """Old log-probabilities are on the masks that the update sees, whatever TRL shuffles."""
    ratios, second = [], []

    class Watched(TwoViews):
        def loss(self, inputs):
            scored, rows = inputs.rounds[0].scored, inputs.rows
            second.append(torch.equal(scored, rows.trained & (rows.draws["view1"] < 0.5)))
            ratios.append((inputs.logps - inputs.old_logps)[scored].abs().max().item())
            assert scored.any() and (inputs.old_logps[~scored] == 0).all()

    options = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "learning_rate": 0.0}
    options |= {"num_iterations": 2, "max_steps": 4}
    trainer = make_trainer(
        tmp_path,
        make_model(family),
        DiffusionGRPOTrainer,
        objective=Watched(),
        gradient_checkpointing=False,
        **options,
    )
    batch = roll_out(trainer)
    views = batch["old_logps"].unbind(1)
    assert len(views) == 2 and not torch.equal(*views)
    trainer.train()
    assert max(ratios) < 1e-5 and second == [False, False, True, True]


@dataclass
class SequenceLoss(TraceObjective):
    """A loss of its own on sequences: -A times the log-likelihood of the whole response."""

    def loss(self, inputs):
        sequences = inputs.logps.sum(1)
        return LossOutputs(-(inputs.advantages * sequences).mean(), {"sequence_logps": sequences.mean()})


@KINDS
def test_a_loss_of_its_own_on_sequences(tmp_path, family):
    trainer = make_trainer(tmp_path, make_model(family), DiffusionGRPOTrainer, objective=SequenceLoss(), max_steps=2)
    trainer.args.logging_steps = trainer.state.logging_steps = 1
    batch, before = roll_out(trainer), weights(trainer.model)
    loss = trainer._compute_loss(trainer.model, batch)
    expected = -(
        batch["advantages"] * batch["sampling_per_token_logps"].where(rows_of(trainer, batch).trained, 0).sum(1)
    ).mean()
    torch.testing.assert_close(loss.detach(), expected, atol=1e-4, rtol=1e-5)
    trainer.train()
    assert changed(trainer, before) and all(value < 0 for value in logged(trainer, "sequence_logps"))


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_a_likelihood_without_a_trainer(family):
    """The Monte-Carlo bound of LLaDA against all masks of a response, one by one."""
    model = make_model(family).eval()
    ids = torch.tensor([[10, 11, 12, 13]])
    rows = Rows(ids, torch.ones_like(ids), ids + 20, torch.ones_like(ids), Grid(None, "response"))
    scorer = Scorer(mask_token_id=2, logit_shift=model.config.logit_shift)
    masks = [torch.tensor([mask]) for mask in product([True, False], repeat=4)][:-1]
    with torch.no_grad():
        logps = scorer(model, rows, [Round(mask, mask) for mask in masks]).dense("logps").sum((1, 2))
        # A mask of k tokens has the weight of the integral of t^(k - 1) (1 - t)^(4 - k) over the level t
        weights = [math.factorial(k - 1) * math.factorial(4 - k) / 24 for k in (int(mask.sum()) for mask in masks)]
        exact = (torch.tensor(weights) * logps).sum()
        objective, estimates = RandomMaskObjective(), []
        for number in range(300):
            drawn = replace(rows, draws=objective.draw(rows, CountingDraws(0, number)))
            rounds = objective.rounds(drawn)
            estimates.append(objective.reduce(scorer(model, drawn, rounds).dense("logps"), rounds).sum())
    estimates = torch.stack(estimates)
    assert abs(estimates.mean() - exact) < 3 * estimates.std() / len(estimates) ** 0.5


class Recorded:
    """Responses that were decoded before, by another model, in place of an engine."""

    exact = False

    def __init__(self, model):
        self.model, self.synced = model.eval(), []

    def sync(self, step):
        self.synced.append(step)

    def generate(self, prompts, parameters, seed, first_row):
        config = DiffusionGenerationConfig(max_new_tokens=9, do_sample=True, block_length=4, denoising_steps=2)
        return generate_rollouts(self.model, prompts, config, seed=seed, index_offset=first_row)


@KINDS
def test_rollouts_that_are_not_the_engines(tmp_path, family):
    source = Recorded(make_model(family, seed=3))
    trainer = make_trainer(tmp_path, make_model(family), block_length=4, rollouts=source, max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    assert source.synced == [0, 1] and changed(trainer, before)
    assert min(logged(trainer, "sampling/sampling_logp_difference/max")) > 1e-2  # said, and no error: `exact` is False
