"""What tests of objectives that draw masks at random share."""

import torch

from dllm_trl.types import Rows

from .test_diffusion_grpo_trainer import answer_with, make_trainer, roll_out
from .test_tracerl_trainer import changed, logged, weights
from .tiny_rl import make_model


def loss_of(tmp_path, monkeypatch, trainer_class, case, **options) -> float:
    """The trainer's loss where the policies have the log-probabilities of a case of a fixture."""
    scored = torch.tensor(case.completion_mask)
    views = {"num_iterations": 2, "use_bias_correction_kl": False, **options}
    trainer = make_trainer(tmp_path, trainer_class=trainer_class, **views)
    tables = (torch.tensor(x, dtype=torch.float64) for x in (case.logp_new, case.logp_old, case.logp_ref))
    new, old, ref = (table.nan_to_num() for table in tables)
    monkeypatch.setattr(trainer.objective, "reduce", lambda token_logps, rounds: token_logps.sum(0))
    answer_with(trainer, monkeypatch, new)
    ids, prompts = torch.zeros(scored.shape, dtype=torch.long), torch.zeros(len(scored), 1, dtype=torch.long)
    rows = Rows(prompts, prompts + 1, ids, ids + 1, trainer.grid, scored)
    rows.draws = everything_drawn(trainer.objective, rows)
    batch = rows.to_batch() | {"prompt_ids": prompts, "prompt_mask": prompts + 1}
    batch |= {"advantages": torch.tensor(case.adv, dtype=torch.float64), "num_items_in_batch": scored.sum()}
    batch |= {"old_logps": old.unsqueeze(1), "ref_logps": ref.unsqueeze(1), "policy_step": torch.tensor(0)}
    return trainer._compute_loss(trainer.model, batch).item()


class Zeros:
    """Draws only zeros: every token is masked."""

    def uniform(self, where):
        return torch.zeros(where.shape)

    levels = uniform


def everything_drawn(objective, rows):
    return objective.draw(rows, Zeros())


def check_that_it_trains(tmp_path, trainer_class, family, **options) -> None:
    """
    On shuffled buffers, with two updates per rollout and accumulation: without a learning rate old and new policy
    agree on each token of both views, with one the weights change.
    """
    ratios = []
    shared = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    shared |= {"num_iterations": 2, "beta": 0.1, "gradient_checkpointing": False, **options}
    for learning_rate in (0.0, 1e-2):
        model = make_model(family)
        trainer = make_trainer(
            tmp_path, model, trainer_class, learning_rate=learning_rate, max_steps=4, logging_steps=1, **shared
        )
        make_inputs = trainer._loss_inputs

        def watch(*args, make_inputs=make_inputs):
            inputs = make_inputs(*args)
            difference = (inputs.logps - inputs.old_logps)[inputs.scored].abs()
            ratios.append(difference.max().item() if len(difference) else 0.0)
            assert (inputs.logps[~inputs.scored] == 0).all()
            return inputs

        trainer._loss_inputs = watch
        before = weights(model)
        trainer.train()
        if learning_rate == 0:
            assert len(ratios) == 8 and max(ratios) < 1e-4
            kl = logged(trainer, "kl")
            assert max(map(abs, kl)) < 1e-6
            views = roll_out(trainer)["old_logps"].unbind(1)
            assert len(views) == 2 and not torch.equal(*views)
        else:
            assert max(ratios[8:]) > 1e-3 and changed(trainer, before)
            assert all(map(torch.isfinite, map(torch.tensor, logged(trainer, "loss"))))
