"""TraceRL of every family: what the trainer scores is what the rollout saw."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from dllm_trl.generation import generate_rollouts
from dllm_trl.objectives.trace import TraceObjective
from dllm_trl.trainers import diffusion_grpo_trainer as base

from .test_tracerl_trainer import changed, logged, make_trainer, weights
from .tiny_rl import FULL, TINY, make_model, make_tokenizer, rows_of, score


ALL = 10**6


def trainer_logps(trainer, rollout, scored):
    with torch.no_grad():
        return score(trainer, dataclasses.replace(rollout.rows(), trained=scored))[0]


def make_rollout(trainer, cache=None, **kwargs):
    """Prompts of different lengths, some rows end early, each has its own limit."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(6, 50, size).tolist() for size in (1, 4, 7, 8)]
    config = trainer.generation_config
    if cache is not None:
        config.cache = cache
    return generate_rollouts(
        trainer.model.eval(), prompts, config, num_generations=3, max_new_tokens=[10, 7, 9, 3], seed=5, **kwargs
    )


def remade(trainer, rollout, order=None, pad=0):
    """The same rows in another order and with more padding on the left."""
    order = torch.arange(len(rollout)) if order is None else order
    rows = rollout.rows()[order]
    padded = {name: torch.nn.functional.pad(getattr(rows, name), (pad, 0)) for name in ("prompt_ids", "prompt_mask")}
    with torch.no_grad():
        return score(trainer, dataclasses.replace(rows, **padded))[0]


@pytest.mark.parametrize("block_length", [4, None])
@pytest.mark.parametrize("family", TINY)
def test_trainer_scores_what_the_rollout_saw(tmp_path, family, block_length):
    trainer = make_trainer(tmp_path, make_model(family), block_length=block_length, denoising_steps=3)
    rollout = make_rollout(trainer)
    ended = rollout.completion_mask.sum(1) < torch.tensor([10, 7, 9, 3]).repeat_interleave(3)
    assert block_length is None or (ended.any() and not ended.all())  # some rows end early
    committed = rollout.step_map >= 0
    logps = trainer_logps(trainer, rollout, committed)
    torch.testing.assert_close(logps, rollout.logprobs * committed, atol=1e-4, rtol=0)
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(0))
    completed = rollout.completion_mask.bool()
    expected = torch.where(completed, rollout.logprobs, 0.0)[order]
    torch.testing.assert_close(remade(trainer, rollout, order, pad=3), expected, atol=1e-4, rtol=0)
    again = make_rollout(trainer, num_slots=2)
    assert torch.equal(again.canvas_ids, rollout.canvas_ids) and torch.equal(again.step_map, rollout.step_map)


@pytest.mark.parametrize("shrink", [1, 4, ALL])
@pytest.mark.parametrize("family", TINY)
def test_on_policy_ratio_is_one(tmp_path, family, shrink, monkeypatch):
    """Old log-probabilities by the trainer, one at a time; new ones with the gradient, in another chunking."""
    ratios = []
    compute = base.DiffusionGRPOTrainer._compute_loss

    def spy(self, model, inputs):
        trained = compute(self, model, inputs)
        with torch.no_grad():
            rows, rounds = rows_of(self, inputs), self.scorer.rounds_per_forward
            self.scorer.rounds_per_forward = 3
            logps = score(self, rows)[0]
            self.scorer.rounds_per_forward = rounds
        ratios.append(((logps - inputs["old_logps"][:, 0]).exp() - 1)[rows.trained].abs().max().item())
        return trained

    monkeypatch.setattr(base.DiffusionGRPOTrainer, "_compute_loss", spy)
    options = {"num_iterations": 2, "shrink": shrink, "block_length": 4, "max_steps": 1, "denoising_steps": 4}
    trainer = make_trainer(tmp_path, make_model(family), **options)
    assert trainer.objective == TraceObjective(shrink)
    before = weights(trainer.model)
    trainer.train()
    assert len(ratios) == 1 and max(ratios) < 1e-4
    unread = {name for name in before if "expert" in name or "router" in name or "gate.weight" in name}
    assert changed(trainer, before) >= set(before) - unread
    if shrink == 1:
        assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-4


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_rollouts_with_a_cache_are_scored_without_it(tmp_path, family, cache):
    """The difference to what the rollout computed is logged; it is no error, and never an old log-probability."""
    trainer = make_trainer(tmp_path, make_model(family), cache=cache, block_length=4, denoising_steps=4, max_steps=1)
    trainer.train()
    assert logged(trainer, "sampling/sampling_logp_difference/max")[0] > 1e-3
    rollout = make_rollout(trainer)
    exact = trainer_logps(trainer, rollout, rollout.step_map >= 0)
    assert (exact - rollout.logprobs).abs().max() > 1e-3
    # From the definition: a forward on the canvas as it was, no cache
    row = 4
    prompt, canvas = rollout.prompt_ids[row][rollout.prompt_mask[row] == 1], rollout.canvas_ids[row]
    steps, exists = rollout.step_map[row], rollout.canvas_mask[row].bool()
    with torch.no_grad():
        for step in range(int(steps.max()) + 1):
            noisy = torch.where((steps >= step) | (steps < 0), 2, canvas)[exists]
            logits = trainer.model(torch.cat([prompt, noisy])[None]).logits[0].log_softmax(-1)
            for column in (steps == step).nonzero()[:, 0].tolist():
                read = len(prompt) + column - trainer.model.config.logit_shift
                assert abs(logits[read, canvas[column]] - exact[row, column]) < 1e-4
    with pytest.raises(ValueError, match="`use_rollout_logprobs=True` needs"):
        make_trainer(tmp_path, make_model(family), cache=cache, use_rollout_logprobs=True)


def test_wrong_caches(tmp_path):
    with pytest.raises(ValueError, match="`cache='dual'` is not for `sdar`, which has block attention"):
        make_trainer(tmp_path, make_model("sdar"), cache="dual")
    with pytest.raises(ValueError, match="`cache='exact'` is not for `llada`.*'none', 'prefix', 'dual'"):
        make_trainer(tmp_path, make_model("llada"), cache="exact")

    class BlocksOnly(TraceObjective):
        attentions = ("block",)

    trainer_class = base.DiffusionGRPOTrainer
    with pytest.raises(ValueError, match="`objective` is for block attention, but `llada` has full attention"):
        make_trainer_with(trainer_class, tmp_path, BlocksOnly())


def make_trainer_with(trainer_class, tmp_path, objective):
    reference = make_trainer(tmp_path, make_model("sdar"))
    return trainer_class(
        make_model("llada"),
        reference.reward_funcs,
        reference.args,
        reference.train_dataset,
        processing_class=reference.processing_class,
        objective=objective,
    )


@pytest.mark.parametrize("family", FULL)
def test_image_codes_and_padding_rows_are_never_sampled(tmp_path, family):
    trainer = make_trainer(tmp_path, make_model(family), temperature=5.0)
    rollout = make_rollout(trainer)
    assert rollout.completion_ids.max() < len(trainer.processing_class)


def test_image_codes_that_the_tokenizer_names_are_never_sampled(tmp_path):
    model, tokenizer = make_model("mmada"), make_tokenizer()
    tokenizer.add_tokens([f"<image_{i}>" for i in range(5)])
    assert len(tokenizer) == model.config.vocab_size == model.config.llm_vocab_size + 5
    trainer = make_trainer(tmp_path, model, processing_class=tokenizer, temperature=5.0)
    assert make_rollout(trainer).completion_ids.max() < model.config.llm_vocab_size


@pytest.mark.parametrize("family", FULL)
def test_gradient_checkpointing_changes_nothing(tmp_path, family):
    results = []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing": checkpointing, "block_length": 4, "max_steps": 1}
        trainer = make_trainer(tmp_path, make_model(family), **options)
        trainer.train()
        results.append(weights(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FULL)
def test_peft(tmp_path, family):
    peft = pytest.importorskip("peft")
    trainer = make_trainer(tmp_path, make_model(family), peft_config=peft.LoraConfig(r=4), beta=0.1, max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    assert {name.split(".")[-3] for name in changed(trainer, before)} <= {"lora_A", "lora_B"} != set()
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", TINY)
def test_logits_that_are_nan_name_the_step_and_the_run(tmp_path, family):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                model.get_output_embeddings().weight.data.fill_(torch.nan)

    trainer = make_trainer(tmp_path, make_model(family), max_steps=3, callbacks=[Diverge()])
    where = f"optimizer step 1 of the run in `output_dir={str(tmp_path)!r}`: .*NaN or infinite in row 0"
    with pytest.raises(FloatingPointError, match=where):
        trainer.train()
