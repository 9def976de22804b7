"""Entropies that a rollout records are those that the trainer computes of the same rounds."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from dllm_trl.generation.engine import decode
from dllm_trl.objectives.trace import TraceObjective
from dllm_trl.scoring import Scorer
from tests.trainers.tiny_rl import BLOCK, FULL

from .conftest import MASK, ragged_prompts, tiny_model


def roll_out(model, temperature=0.7, **options):
    config = {"max_new_tokens": 11, "block_length": 4, "denoising_steps": 3, "do_sample": True}
    config = DiffusionGenerationConfig(**{**config, "temperature": temperature, **options})
    return generate_rollouts(model, ragged_prompts(), config, num_generations=2, seed=3, record_entropies=True)


@pytest.mark.parametrize("family", [*BLOCK, *FULL])
def test_entropies_of_the_rollout_are_the_scorers(family):
    model = tiny_model(family, **({"llm_vocab_size": 64} if family == "mmada" else {}))
    rollout = roll_out(model, eos_token_id=list(range(3, 9)))
    rows, scorer = rollout.rows(None), Scorer(MASK, model.config.logit_shift, temperature=0.7)
    with torch.no_grad():
        expected = scorer(model, rows, TraceObjective().rounds(rows)).mean("entropies")
    committed = rollout.step_map >= 0
    assert rollout.entropies.dtype == torch.float32 and (rollout.entropies[~committed] == 0).all()
    assert expected[committed].min() < 2 and expected[committed].std() > 0.1
    torch.testing.assert_close(rollout.entropies, expected, atol=1e-5, rtol=0)
    assert torch.equal(rows.entropies, rollout.entropies) and "rows/entropies" in rows.to_batch()


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_entropies_are_recorded_only_when_asked_and_change_nothing(family):
    model = tiny_model(family)
    config = DiffusionGenerationConfig(max_new_tokens=11, block_length=4, denoising_steps=3, temperature=0.7)
    options = {"num_generations": 2, "seed": 3}
    plain = generate_rollouts(model, ragged_prompts(), config, **options)
    other = generate_rollouts(model, ragged_prompts(), config, record_entropies=True, num_slots=3, **options)
    assert plain.entropies is None and "rows/entropies" not in plain.rows().to_batch()
    for name in ("canvas_ids", "step_map", "num_forward_passes"):
        assert torch.equal(getattr(plain, name), getattr(other, name))


def test_filters_do_not_change_what_an_entropy_is_of():
    """Of the whole vocabulary: nothing of the first step depends on which tokens were allowed."""
    model = tiny_model("llada")
    every, filtered = roll_out(model, temperature=1.0), roll_out(model, temperature=1.0, top_k=1)
    first = (every.step_map == 0) & (filtered.step_map == 0)
    assert first.any()
    torch.testing.assert_close(every.entropies[first], filtered.entropies[first])


def test_what_a_time_limit_cut_off_has_neither(monkeypatch):
    """The second block was begun: its masks have no numbers, not even those of the block before."""
    clock = iter(range(10))
    monkeypatch.setattr("dllm_trl.generation.decoder.time", SimpleNamespace(time=lambda: next(clock)))
    model = tiny_model()
    config = DiffusionGenerationConfig(max_new_tokens=8, block_length=2, denoising_steps=2, max_time=1.0)
    config, _ = model._resolve_generation_config(config)
    settings = replace(model._decoding_settings(config), deadline=1.5, record_entropies=True)
    rollout = decode(model, [np.arange(4)], [8], settings)
    cut = rollout.step_map < 0
    assert rollout.num_forward_passes.item() == 3 and cut.sum() == 1 and cut.size(1) == 4
    assert rollout.logprobs[cut] == 0 and rollout.entropies[cut] == 0 and (rollout.entropies[~cut] > 0).all()
