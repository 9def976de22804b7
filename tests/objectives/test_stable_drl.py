"""StableDRL against the numbers of the public code, by hand, and in training."""

import math

import pytest
import torch

from dllm_trl.objectives import LossInputs
from dllm_trl.objectives.elbo import elbo_rounds
from dllm_trl.objectives.sandwich import spg_bounds, spg_sequence_logp
from dllm_trl.objectives.stable_drl import StableDRLObjective
from dllm_trl.types import Grid, Round, Rows

from ..trainers.test_diffusion_grpo_trainer import roll_out
from ..trainers.tiny_rl import rows_of
from .in_training import cases, check_learns, exact, losses_seen, trainer_of


FAMILIES = pytest.mark.parametrize("family", ["sdar", "llada"])


def inputs_of(objective, new, masks, old, old_masks, completion, advantages):
    """What the trainer gives a loss; log-probabilities and masks are `(K, B, R)`, others `(B, ...)`."""
    ones = torch.ones_like(completion).long()
    rows = Rows(ones[:, :1], ones[:, :1], ones, ones, Grid(4), completion)
    rounds, old_rounds = (elbo_rounds([Round(m, m) for m in group & completion]) for group in (masks, old_masks))
    scored = new * torch.stack([r.scored for r in rounds])
    logps = objective.reduce(scored, rounds)
    old_logps = objective.reduce(old * torch.stack([r.scored for r in old_rounds]), old_rounds)
    return LossInputs(rows, rounds, scored, logps, old_logps, None, advantages, torch.tensor(1.0))


def test_weights_and_loss(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "stabledrl_loss"):
        logps = [exact(inputs[f"logp_{who}"]).transpose(0, 1) for who in ("new", "old")]  # (K, B, R)
        masks = [exact(inputs[f"mask_{who}"]).transpose(0, 1) for who in ("new", "old")]
        new, old = zip(logps, masks, strict=True)
        completion, worth = exact(inputs["completion"]).bool(), exact(inputs["adv"])
        options = {"eubo_beta": inputs["eubo_beta"], "mix_weight": inputs["weight"], "max_ratio": inputs["max_ratio"]}
        objective = StableDRLObjective(**options)
        given = inputs_of(objective, *new, *old, completion, worth)
        ours = {
            "elbo_new": given.logps.sum(1),
            "elbo_old": given.old_logps.sum(1),
            "weights": objective.log_weights(given).softmax(0),
            "bound": spg_sequence_logp(*new, completion, worth > 0, "mix", inputs["eubo_beta"], inputs["weight"]),
        }
        for key, values in ours.items():
            assert values.tolist() == pytest.approx(expected[key], rel=1e-6), (name, key)
        # Without weights of a whole step they are those of the rows that are given
        assert objective.loss(given).loss.item() == pytest.approx(expected["loss"], rel=1e-6), name
        given.batch_weights = objective.log_weights(given).softmax(0) * len(worth)
        assert objective.loss(given).loss.item() == pytest.approx(expected["loss"], rel=1e-6), name


def test_by_hand():
    """Two responses of a token: one has become e times as likely, the other a thousand times, which counts as five."""
    one = torch.ones(1, 2, 1, dtype=torch.bool)
    new, old = torch.tensor([[[-2.0], [-1.0]]]), torch.tensor([[[-3.0], [-1 - math.log(1000)]]])
    given = inputs_of(StableDRLObjective(num_samples=1), new, one, old, one, one[0], torch.tensor([1.0, -1.0]))
    assert StableDRLObjective().log_weights(given).exp().tolist() == pytest.approx([math.e, 5.0])
    # A single token that is masked for certain: upper and lower bound are its log-probability
    loss = StableDRLObjective().loss(given).loss
    assert loss.item() == pytest.approx((2 * math.e - 5) / (math.e + 5))


def test_the_elbo_is_a_mean_over_corruptions_of_means_over_tokens():
    rounds = elbo_rounds([Round(mask, mask) for mask in torch.tensor([[[True, True]], [[True, False]]])])
    logps = torch.tensor([[[-1.0, -3.0]], [[-4.0, 0.0]]])
    assert StableDRLObjective().reduce(logps, rounds).sum(1).tolist() == [-3.0]  # (-2 - 4) / 2


@FAMILIES
def test_old_and_new_masks_differ_and_the_elbo_is_that_of_the_bounds(tmp_path, family):
    """What old and current policy are scored on, of either update; and `log_weights` reads what `loss` does."""
    trainer, seen = losses_seen(tmp_path, family, StableDRLObjective(num_views=2))
    for inputs in seen:
        rows, masks = inputs.rows, torch.stack([r.scored for r in inputs.rounds])
        view = 0 if torch.equal(masks, scored_of(trainer.objective.rounds(rows, 0))) else 1
        assert torch.equal(masks, scored_of(trainer.objective.rounds(rows, view)))
        old = trainer.objective.old_rounds(rows, view)
        assert not torch.equal(masks, scored_of(old))
        elbo = spg_bounds(inputs.token_logps, masks, rows.trained)[0].detach()
        torch.testing.assert_close(inputs.logps.detach().sum(1), elbo, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            token_logps = trainer.scorer(trainer.model, rows, old).dense("logps")
        old_elbo = spg_bounds(token_logps, scored_of(old), rows.trained)[0]
        torch.testing.assert_close(inputs.old_logps.sum(1), old_elbo, rtol=1e-5, atol=1e-5)
        expected = (elbo - old_elbo).clamp(max=math.log(5))
        torch.testing.assert_close(trainer.objective.log_weights(inputs), expected, rtol=1e-4, atol=1e-5)
    views = {tuple(map(bool, scored_of(inputs.rounds).flatten().tolist())) for inputs in seen}
    assert len(views) == 4


def scored_of(rounds):
    return torch.stack([one.scored for one in rounds])


@FAMILIES
def test_weights_are_those_of_the_whole_step(tmp_path, family):
    """They add up to the number of its rows, over its micro-batches; in an evaluation to that of a batch."""
    trainer, seen = losses_seen(tmp_path, family, StableDRLObjective())
    for step in (seen[:2], seen[2:]):
        weights = torch.cat([inputs.batch_weights for inputs in step])
        logs = torch.cat([trainer.objective.log_weights(inputs) for inputs in step])
        torch.testing.assert_close(weights, logs.softmax(0) * 8, rtol=1e-4, atol=1e-5)
        assert weights.std() > 0 and not weights[:4].sum().item() == pytest.approx(4, abs=1e-6)
    inputs = seen[0]
    inputs.batch_weights = None
    assert trainer.objective.loss(inputs).loss.isfinite()


def test_splitting_a_step_changes_nothing(tmp_path):
    """Rows in 1, 2 or 4 micro-batches: the same weights after two updates on a rollout."""
    results = {}
    for size in (8, 4, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "num_iterations": 2}
        objective = StableDRLObjective(num_views=2)
        trainer = trainer_of(tmp_path, "sdar", objective, max_steps=2, learning_rate=1e-3, optim="sgd", **options)
        trainer.train()
        results[size] = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    for size in (4, 2):
        for name in results[8]:
            torch.testing.assert_close(results[size][name], results[8][name], atol=1e-6, rtol=1e-4)


def test_rows_of_which_nothing_is_scored_do_no_harm(tmp_path):
    """All groups dropped: a step without gradient, and no number that is none."""
    trainer = trainer_of(tmp_path, "sdar", "stable_drl", accuracy_range=[1.0, 1.0], max_steps=1)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


@pytest.mark.parametrize("options", [{"max_ratio": 0.0}, {"eubo_beta": -1.0}, {"num_samples": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        StableDRLObjective(**options)


@FAMILIES
def test_it_trains(tmp_path, family):
    trainer = check_learns(tmp_path, family, "stable_drl", num_iterations=2, objective_kwargs={"num_samples": 3})
    assert trainer.objective == StableDRLObjective(num_samples=3, num_views=2)
    assert roll_out(trainer)["old_logps"].shape[1] == 2 and rows_of(trainer, roll_out(trainer)).draws
