"""Trainers whose objectives draw masks at random: every family, every option, every way to hand rows around."""

import dataclasses
import json
from functools import cache

import pytest
import torch

from dllm_trl.objectives.coupled import CoupledObjective
from dllm_trl.objectives.diffu_grpo import DiffuGRPOObjective
from dllm_trl.objectives.trace import TraceObjective
from dllm_trl.objectives.unigrpo import UniGRPOObjective
from dllm_trl.trainers import (
    CoupledGRPOConfig,
    CoupledGRPOTrainer,
    DiffusionGRPOConfig,
    RandomMaskGRPOConfig,
    RandomMaskGRPOTrainer,
    TraceRLTrainer,
)

from .test_diffusion_grpo_trainer import make_trainer, roll_out
from .test_tracerl_trainer import weights
from .tiny_rl import ON_CPU, TINY, make_model, rows_of, score


KINDS = {
    "coupled": (CoupledGRPOTrainer, {}),
    "pair": (CoupledGRPOTrainer, {"estimate": "pair"}),
    "random_mask": (RandomMaskGRPOTrainer, {"num_masks": 2}),
    "diffu_grpo": (RandomMaskGRPOTrainer, {"objective": "diffu_grpo", "prompt_mask_prob": 0.4}),
}


def make(kind, tmp_path, model=None, **options):
    trainer_class, own = KINDS[kind]
    return make_trainer(tmp_path, model, trainer_class, **{**own, **options})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TINY)
def test_old_and_new_policy_see_the_same_masks(tmp_path, kind, family):
    """In both views, whatever the order of the rows, in whatever parts, and however prompts are padded."""
    options = {"num_iterations": 2, "denoising_steps": 4, "block_length": 4, "temperature": 0.9}
    trainer = make(kind, tmp_path, make_model(family), **options)
    batch = roll_out(trainer, prompts=(0, 5, 9))
    rows, old = rows_of(trainer, batch), batch["old_logps"]
    assert old.shape[1] == 2 and not torch.equal(*old.unbind(1))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    padded = {name: torch.nn.functional.pad(getattr(rows, name), (3, 0)) for name in ("prompt_ids", "prompt_mask")}
    draws = {k: torch.nn.functional.pad(v, (3, 0)) if k == "prompt" else v for k, v in rows.draws.items()}
    rows = dataclasses.replace(rows, **padded, draws=draws)[order]
    for view in range(2):
        with torch.no_grad():
            parts = [score(trainer, rows[start : start + 5], view)[0] for start in range(0, len(rows), 5)]
        torch.testing.assert_close(torch.cat(parts), old[order, view], atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_parts_of_a_step_add_up(tmp_path, kind, family):
    """The loss of shuffled parts is the loss of the whole: each is divided by what the view scores in all of them."""
    trainer = make(kind, tmp_path, make_model(family), num_iterations=2, beta=0.1, learning_rate=1e-2)
    batch = roll_out(trainer, prompts=(0, 5, 9))
    with torch.no_grad():  # the policy has moved
        for parameter in trainer.model.parameters():
            parameter.mul_(1.05)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    parts = [{k: v[o] if v.ndim and len(v) == 12 else v for k, v in batch.items()} for o in order.split(4)]
    for step in (0, 1):
        trainer._step = step * trainer.args.steps_per_generation  # of the second view
        assert trainer._view() == step
        with torch.no_grad():
            whole = trainer._compute_loss(trainer.model, batch)
            added = sum(trainer._compute_loss(trainer.model, part) for part in parts)
        assert whole != 0
        torch.testing.assert_close(added, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_do_not_depend_on_the_batch(tmp_path, kind):
    """A row draws from its place in the run: with fewer others beside it, and shorter prompts, it draws the same."""
    draws = []
    for prompts, seed in (((0, 5), 0), ((0,), 0), ((0,), 1)):
        trainer = make(kind, tmp_path, num_iterations=2, seed=seed)
        rows = rows_of(trainer, roll_out(trainer, prompts=prompts))
        width = rows.prompt_mask.sum(1)[:4].max() if kind == "diffu_grpo" else 9
        side = slice(-width, None) if kind == "diffu_grpo" else slice(width)
        draws.append(torch.cat([drawn[:4, :, side].double() for drawn in rows.draws.values()], dim=2))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_in_the_middle_of_a_buffer(tmp_path, kind):
    """Four updates on a buffer of two parts; it goes on after the third."""
    options = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
    options |= {"num_iterations": 2, "max_steps": 6, "beta": 0.1, "save_strategy": "steps", "save_steps": 1}
    options |= {"learning_rate": 1e-2, "disable_tqdm": True}
    straight = make(kind, tmp_path / "a", **options)
    straight.train()
    resumed = make(kind, tmp_path / "b", make_model(seed=1), **options)
    # The reference is the policy that was given
    resumed.ref_model.load_state_dict(make_model().state_dict())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    expected = weights(straight.model)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed.model).items())


def test_what_a_config_says_is_what_the_objective_has(tmp_path):
    trainer = make("coupled", tmp_path, estimate="pair", lower=0.3, upper=0.4, num_iterations=3)
    assert trainer.objective == CoupledObjective("pair", 0.3, 0.4, 3)
    options = {"ratios": "uniform", "lower": 0.1, "upper": 0.9, "num_masks": 2, "likelihood": "sequence"}
    trainer = make_trainer(tmp_path, None, RandomMaskGRPOTrainer, **options)
    assert trainer.objective == UniGRPOObjective(0.1, 0.9, "uniform", 2, "sequence", 1)
    for where in ({"objective": "diffu_grpo"}, {"objective": DiffuGRPOObjective(0.3)}):
        trainer = make_trainer(tmp_path, None, RandomMaskGRPOTrainer, prompt_mask_prob=0.3, **where)
        assert trainer.objective == DiffuGRPOObjective(0.3, 1)
    args = RandomMaskGRPOConfig(str(tmp_path), objective="diffu_grpo", prompt_mask_prob=0.2, **ON_CPU)
    assert args.objective_options()["diffu_grpo"] == {"prompt_mask_prob": 0.2}
    # Others by their names, with their own options; `objective_kwargs` beside the config's fields, and before them
    assert make("coupled", tmp_path, objective="trace").objective == TraceObjective()
    assert make("coupled", tmp_path, objective_kwargs={"lower": 0.1}, upper=0.7).objective.lower == 0.1
    assert make_trainer(tmp_path, None, TraceRLTrainer, shrink=3).objective == TraceObjective(3)
    named = make_trainer(tmp_path, None, TraceRLTrainer, shrink=3, objective="coupled")
    assert named.objective == CoupledObjective()
    with pytest.raises(ValueError, match="`objective='coupled'` has no option .'shrink'."):
        make("coupled", tmp_path, objective_kwargs={"shrink": 2})


@pytest.mark.parametrize(
    ("config", "options", "named"),
    [
        (CoupledGRPOConfig, {"lower": 0}, "`lower=0`"),
        (CoupledGRPOConfig, {"upper": 1.5}, "`upper=1.5`"),
        (CoupledGRPOConfig, {"estimate": "both"}, "`estimate`"),
        (RandomMaskGRPOConfig, {"lower": 0.7, "upper": 0.3}, "`lower=0.7`, `upper=0.3`"),
        (RandomMaskGRPOConfig, {"ratios": "even"}, "`ratios`"),
        (RandomMaskGRPOConfig, {"likelihood": "both"}, "`likelihood`"),
        (RandomMaskGRPOConfig, {"num_masks": 1.5}, "`num_masks`"),
        (RandomMaskGRPOConfig, {"prompt_mask_prob": 2}, "`prompt_mask_prob=2`"),
    ],
)
def test_values_that_make_no_sense_are_refused_at_once(tmp_path, config, options, named):
    with pytest.raises(ValueError, match=named):
        config(str(tmp_path), **ON_CPU, **options)


OPTIONS = [
    ("coupled", {"estimate": "pair"}),
    ("coupled", {"lower": 0.7}),
    ("coupled", {"upper": 0.3}),
    ("random_mask", {"ratios": "uniform"}),
    ("random_mask", {"lower": 0.5}),
    ("random_mask", {"upper": 0.5}),
    ("random_mask", {"num_masks": 1}),
    ("random_mask", {"likelihood": "sequence"}),
    ("diffu_grpo", {"prompt_mask_prob": 0.9}),
]


def test_every_option_is_listed():
    own = {f.name for f in (*dataclasses.fields(CoupledGRPOConfig), *dataclasses.fields(RandomMaskGRPOConfig))}
    assert own - {f.name for f in dataclasses.fields(DiffusionGRPOConfig)} == {next(iter(o)) for _, o in OPTIONS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights after two updates on a rollout."""

    @cache
    def of(kind, *options):
        shared = {"max_steps": 2, "num_iterations": 2, "learning_rate": 1e-2, "gradient_checkpointing": False}
        trainer = make(kind, tmp_path_factory.mktemp(kind), **shared, **dict(options))
        trainer.train()
        return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])

    return of


@pytest.mark.parametrize(("kind", "change"), OPTIONS)
def test_every_option_acts(trained, kind, change):
    assert not torch.equal(trained(kind), trained(kind, *change.items()))


def test_nothing_makes_no_difference(trained):
    assert torch.equal(trained("coupled"), trained("coupled", ("lower", 0.2)))


@pytest.mark.parametrize(
    ("kind", "name", "paper"),
    [
        ("coupled", "Coupled GRPO", "2506.20639"),
        ("random_mask", "Random-mask GRPO", "2505.15809"),
        ("diffu_grpo", "Random-mask GRPO", "2504.12216"),
    ],
)
def test_model_cards_cite_the_paper(tmp_path, kind, name, paper):
    trainer = make(kind, tmp_path, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert name in card and paper in card and "2402.03300" not in card.split("## Citations")[0]
    assert all(tag in card for tag in trainer._tag_names)


def test_the_likelihood_of_a_sequence_is_trls(tmp_path):
    """With one mask: TRL's ratio of a sequence is the mean over its scored tokens."""
    losses, options = [], {"num_iterations": 2, "lower": 0.3}
    for own in ({"likelihood": "sequence"}, {"importance_sampling_level": "sequence"}):
        trainer = make_trainer(tmp_path, None, RandomMaskGRPOTrainer, **options, **own)
        batch = roll_out(trainer)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(1.05)
            losses.append(trainer._compute_loss(trainer.model, batch))
    assert losses[0] != 0
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-4)


def test_a_trainer_with_another_objective_does_not_take_the_credit(tmp_path):
    trainer = make_trainer(tmp_path, None, TraceRLTrainer, objective="coupled", max_steps=1)
    assert (trainer._name, trainer._paper["id"]) == ("Diffusion GRPO", "2506.20639")
    trainer = make_trainer(tmp_path, None, TraceRLTrainer, objective=lambda rows: TraceObjective().rounds(rows))
    assert (trainer._name, trainer._paper) == ("Diffusion GRPO", {})
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "TraceRL" not in card and "2509.06949" not in card
    trainer = make_trainer(tmp_path)
    assert (trainer._name, trainer._paper["id"]) == ("TraceRL", "2509.06949") and "tracerl" in trainer._tag_names


def test_evaluation_takes_masks_too(tmp_path):
    """The same ones each time."""
    trainer = make("coupled", tmp_path, num_iterations=2, eval_strategy="no", per_device_eval_batch_size=4)
    found = [trainer.evaluate(trainer.train_dataset.select(range(2)))["eval_loss"] for _ in range(2)]
    assert found[0] == found[1]


def test_a_checkpoint_says_what_its_masks_were(tmp_path):
    trainer = make("coupled", tmp_path)
    assert json.loads(trainer._rollout_settings()["objective"]) == repr(trainer.objective)
