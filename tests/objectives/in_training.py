"""What the tests of every objective do with a trainer: a few steps of a tiny model, and what its losses were given."""

import json
import math
from dataclasses import fields

import numpy as np
import torch

from dllm_trl.trainers import DiffusionGRPOTrainer

from ..trainers.test_diffusion_grpo_trainer import make_trainer
from ..trainers.test_tracerl_trainer import changed, logged, weights
from ..trainers.tiny_rl import make_model


def cases(folder, name):
    """Inputs, expected outputs and name of each case of a file of numbers."""
    return [
        (c["inputs"], c["expected"], c["name"]) for c in json.loads((folder / f"{name}.json").read_text())["cases"]
    ]


def exact(values):
    """Numbers of a file as a tensor, in double precision where they are no integers."""
    return torch.from_numpy(np.asarray(values))


def trainer_of(tmp_path, family, objective, **options):
    return make_trainer(
        tmp_path,
        make_model(family),
        DiffusionGRPOTrainer,
        **{"objective": objective, "block_length": 4, "gradient_checkpointing": False, "logging_steps": 1, **options},
    )


def check_learns(tmp_path, family, objective, steps=2, **options):
    """Finite losses, other weights."""
    trainer = trainer_of(tmp_path, family, objective, max_steps=steps, learning_rate=1e-3, **options)
    before = weights(trainer.model)
    trainer.train()
    assert len(logged(trainer, "loss")) == steps and all(map(math.isfinite, logged(trainer, "loss")))
    assert changed(trainer, before)
    return trainer


def losses_seen(tmp_path, family, objective, **options):
    """What an instance's losses are given in two updates on a rollout of two micro-batches each, nothing changing."""
    seen = []

    class Watched(type(objective)):
        def loss(self, inputs):
            seen.append(inputs)
            return super().loss(inputs)

    watched = Watched(**{f.name: getattr(objective, f.name) for f in fields(objective) if f.init})
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2} | options
    trainer = trainer_of(tmp_path, family, watched, max_steps=2, learning_rate=0.0, **options)
    trainer.train()
    assert len(seen) == 4
    return trainer, seen


def check_ratio_is_one(tmp_path, family, objective, **options):
    """The old policy is scored on what the updates score: the second one, whatever TRL shuffles, has the same."""
    trainer, seen = losses_seen(tmp_path, family, objective, **options)
    for inputs in seen:
        assert inputs.scored.any()
        torch.testing.assert_close(inputs.logps.detach(), inputs.old_logps, atol=1e-5, rtol=1e-5)
    return trainer, seen
