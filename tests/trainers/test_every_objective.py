"""What must hold of every objective of reinforcement learning, whatever it masks and scores."""

import random

import numpy as np
import pytest
import torch
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from dllm_trl.objectives import OBJECTIVES, Objective, any_scored
from dllm_trl.trainers import DiffusionGRPOTrainer
from dllm_trl.trainers.batch_weights import weigh_batch
from dllm_trl.trainers.draws import CountingDraws
from dllm_trl.trainers.rollouts import seed_of
from dllm_trl.types import Rows

from .test_diffusion_grpo_trainer import make_trainer, roll_out
from .test_tracerl_trainer import weights
from .tiny_rl import LENIENT, TINY, config_class, make_model, rows_of


# The prompt is what is asked; only these hide some of it
MASKS_PROMPTS = {"diffu_grpo", "spg", "stable_drl", "wd1"}
CHECKED = ("sdar", "llada", "Dream")
OTHERS = ("Dream", "Fast_dLLM_Qwen", "sdar_moe")  # shifted heads, experts


def attention(family):
    return config_class(family).diffusion_attention


def pairs(families):
    fitting = {name: [f for f in families if attention(f) in kind.attentions] for name, kind in OBJECTIVES.items()}
    return [(name, family) for name in fitting for family in fitting[name]]


def by_family(*fast, slow=()):
    """Objectives with those of the named families that they are for."""
    found = [(name, family, pytest.mark.slow if family in slow else ()) for name, family in pairs((*fast, *slow))]
    return [pytest.param(name, family, marks=marks, id=f"{name}-{family}") for name, family, marks in found]


def trainer_of(tmp_path, objective, family, **options):
    """A trainer whose config leaves decoding to the objective."""
    options = {"remasking_strategy": None, "denoising_steps": None, "num_iterations": 2} | options
    options |= {"router_aux_loss_coef": 0.0}  # experts: of what shares a micro-batch
    options |= {"block_length": 4 if attention(family) == "block" else None, "gradient_checkpointing": False}
    options |= {"objective": objective, "objective_kwargs": LENIENT.get(objective)}
    return make_trainer(tmp_path, make_model(family), DiffusionGRPOTrainer, **options)


def rolled_out(tmp_path, objective, family, **options):
    """A trainer in which two optimizer steps of two micro-batches of four rows take a rollout, and the rollout."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} | options
    trainer = trainer_of(tmp_path, objective, family, max_completion_length=10, **options)
    batch = roll_out(trainer, prompts=(0, 5))
    lengths = rows_of(trainer, batch).trained.sum(1)
    assert lengths.min() < lengths.max()
    return trainer, batch


def buffered(trainer, batch):
    """The rollout as TRL's buffer holds it: shuffled and split into micro-batches."""
    return split_tensor_dict(shuffle_sequence_dict(batch), trainer.args.steps_per_generation)


def at_view(trainer, view):
    trainer._step = view * trainer.args.steps_per_generation
    assert trainer._view() == view % trainer.objective.num_views


@pytest.mark.parametrize(("objective", "family"), by_family(*TINY))
def test_ratio_is_one_on_policy(tmp_path, objective, family):
    """
    As long as the weights are those of the rollout, each of its updates finds the old log-probabilities, whatever
    shares a micro-batch with a row. Where old masks are others on purpose, on those. A loss without a ratio asks for
    no old ones.
    """
    trainer, batch = rolled_out(tmp_path, objective, family, per_device_train_batch_size=8)
    fresh = type(trainer.objective).old_rounds is not Objective.old_rounds
    for view in range(trainer.num_iterations):
        at_view(trainer, view)
        for inputs in buffered(trainer, batch):
            rows = rows_of(trainer, inputs)
            with torch.no_grad():
                _, parts = trainer._score(trainer.model, inputs, rows)
            logps, scored = parts.logps, parts.scored
            if fresh:
                rounds = trainer.objective.old_rounds(rows, trainer._view())
                with torch.no_grad():
                    scores = trainer.scorer(trainer.model, rows, rounds)
                logps, scored = trainer.objective.reduce(scores.dense("logps"), rounds), any_scored(rounds)
            assert scored.any() and (parts.old_logps is not None) == trainer.objective.has_ratio
            if parts.old_logps is not None:
                torch.testing.assert_close(logps, parts.old_logps, atol=2e-5, rtol=1e-5)
            if logps.shape == scored.shape:
                assert (logps[~scored] == 0).all()


def step_of(trainer, batch, steps, view):
    """Loss and gradient of one update in `steps` micro-batches."""
    trainer.args.steps_per_generation = trainer.args.gradient_accumulation_steps = steps
    trainer.current_gradient_accumulation_steps = steps
    at_view(trainer, view)
    micro_batches = buffered(trainer, batch)
    if trainer._weighs_batch:
        weigh_batch(trainer, micro_batches)
    trainer.model.zero_grad()
    losses = [trainer._compute_loss(trainer.model, inputs) for inputs in micro_batches]
    sum(losses).backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return sum(losses).detach(), gradients


@pytest.mark.parametrize(("objective", "family"), by_family("sdar", "llada", slow=OTHERS))
def test_an_update_does_not_depend_on_how_the_rollout_is_cut(tmp_path, objective, family):
    """Rows that are shuffled into 1 or 4 micro-batches have one loss and gradient, after the weights have moved."""
    trainer, batch = rolled_out(tmp_path, objective, family)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    for view in range(trainer.num_iterations):
        loss, gradients = step_of(trainer, batch, 1, view)
        size = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert size > 1e-6
        other, others = step_of(trainer, batch, 4, view)
        torch.testing.assert_close(other, loss, rtol=1e-4, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5 * size.item(), msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "family"), pairs(("sdar", "llada", "Fast_dLLM_Qwen")))
def test_training_does_not_depend_on_how_the_rollout_is_cut(tmp_path, objective, family):
    """The same through whole runs, of two updates on each of two rollouts."""
    results = []
    for size, steps, seed in ((8, 1, 0), (4, 2, 1), (2, 4, 2)):
        trainer = trainer_of(
            tmp_path,
            objective,
            family,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_completion_length=10,
            max_steps=4,
            optim="sgd",
            learning_rate=0.02,
            lr_scheduler_type="constant",
            logging_steps=1,
            max_grad_norm=0.5,
        )
        before = weights(trainer.model)
        torch.manual_seed(seed)  # the shuffling
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results.append((weights(trainer.model), losses))
    after, losses = results[0]
    assert any(not torch.equal(after[name], before[name]) for name in before)
    for found, other in results[1:]:
        assert other == pytest.approx(losses, rel=1e-3, abs=1e-4)
        for name, value in found.items():
            torch.testing.assert_close(value, after[name], atol=1e-5, rtol=1e-3, msg=name)


def rounds_of(objective: Objective, rows: Rows, view: int):
    return objective.rounds(rows, view) + objective.old_rounds(rows, view)


@pytest.mark.parametrize(("objective", "family"), by_family(*CHECKED))
def test_rounds_are_a_pure_function_of_the_row(tmp_path, objective, family):
    trainer, batch = rolled_out(tmp_path, objective, family)
    rows, made = rows_of(trainer, batch), trainer.objective
    rows.trained[3] = False  # a row that was dropped
    rows.draws = made.draw(rows, CountingDraws(3, 0))
    exists, prompt = rows.canvas_mask.bool(), rows.prompt_mask.bool()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for view in range(made.num_views):
        rounds = rounds_of(made, rows, view)
        assert rounds and not any(r.scored[3].any() for r in rounds)
        for one in rounds:
            assert not (one.scored & ~one.masked).any() and not (one.scored & ~rows.trained).any()
            assert not (one.masked & ~exists).any()
            assert one.prompt_masked is None or not (one.prompt_masked & ~prompt).any()
            assert one.prompt_masked is None or objective in MASKS_PROMPTS
        for first in range(len(rows)):  # of any row, alone
            alone = rounds_of(made, rows[first : first + 1], view)
            for name in ("masked", "scored"):
                found = {tuple(getattr(r, name)[0].tolist()) for r in alone if r.scored.any()}
                assert found == {tuple(getattr(r, name)[first].tolist()) for r in rounds if r.scored[first].any()}
    assert torch.equal(states[0], torch.get_rng_state()) and random.getstate() == states[2]
    assert np.array_equal(states[1], np.random.get_state()[1])


@pytest.mark.parametrize(("objective", "family"), by_family(*CHECKED))
def test_draws_are_a_function_of_seed_and_place(tmp_path, objective, family):
    trainer, batch = rolled_out(tmp_path, objective, family)
    rows, made = rows_of(trainer, batch), trainer.objective
    assert made.draw(rows, CountingDraws(seed_of(trainer.args, "train"), 0)).keys() == rows.draws.keys()
    parts = [made.draw(rows[i : i + 2], CountingDraws(7, 100 + i)) for i in range(0, len(rows), 2)]
    for name, drawn in made.draw(rows, CountingDraws(7, 100)).items():
        assert torch.equal(drawn, torch.cat([part[name] for part in parts])), name
    other = made.draw(rows, CountingDraws(8, 100))
    assert not other or any(not torch.equal(other[name], drawn) for name, drawn in rows.draws.items())
