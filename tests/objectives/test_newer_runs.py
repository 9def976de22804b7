"""Whole runs of objectives with a loss of their own: in two processes, killed and resumed, and until they learnt."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from dllm_trl import DiffusionGRPOConfig, DiffusionGRPOTrainer

from ..trainers.test_distributed import history, launch
from ..trainers.test_training_gain import digit_reward
from ..trainers.tiny_rl import ON_CPU, make_model, make_prompts, make_tokenizer


PAIRS = [(name, family) for name in ("gdpo", "just_grpo", "stable_drl", "ebpo") for family in ("sdar", "llada")]
PAIRS += [("block_reveal", "sdar")]
SEQUENCE = [("spg", "sdar"), ("spg", "llada"), ("wd1", "llada"), ("espo", "llada"), ("bgpo", "sdar"), ("dipo", "sdar")]
LEARNS = [("spg", "sdar"), ("spg", "llada"), ("wd1", "llada"), ("bgpo", "llada"), ("dipo", "sdar")]
OPTIONS = {"num_iterations": 2, "block_length": 4, "remasking_strategy": None, "denoising_steps": None}
SGD = {"optim": "sgd", "learning_rate": 0.02, "lr_scheduler_type": "constant"}  # Adam would enlarge rounding


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "family"), PAIRS + SEQUENCE)
def test_two_processes_equal_one_with_accumulation(tmp_path, objective, family):
    """Two updates on each of two rollouts, groups split over the processes, some of them dropped."""
    options = {"per_device_train_batch_size": 2, "max_steps": 4, "accuracy_range": [0.25, 0.5], "save_strategy": "no"}
    options |= {"objective": objective, "family": family, **OPTIONS, **SGD}
    launch(tmp_path / "one", gradient_accumulation_steps=4, **options)
    launch(tmp_path / "two", processes=2, gradient_accumulation_steps=2, **options)
    for name in ("loss", "grad_norm"):
        one = history(tmp_path / "one", name)
        assert len(one) == 4 and max(map(abs, one)) > 0
        assert history(tmp_path / "two", name) == pytest.approx(one, rel=1e-3, abs=1e-5)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "family"), [("stable_drl", "sdar"), ("gdpo", "llada"), ("just_grpo", "sdar")])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, objective, family):
    """In the middle of the second view of a rollout that lasts four updates of two micro-batches; bit for bit."""
    options = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    options |= {"max_steps": 9, "save_steps": 1, "save_total_limit": 2, "rows": 5}
    options |= {"objective": objective, "family": family, **OPTIONS}
    assert launch(tmp_path / "whole", **options) == 0
    assert launch(tmp_path / "killed", kill_at=7, **options) == -signal.SIGKILL
    assert launch(tmp_path / "killed", resume=True, **options) == 0
    whole, killed = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    assert history(tmp_path / "whole", "reward") == history(tmp_path / "killed", "reward")


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "family"), PAIRS + LEARNS)
def test_the_reward_rises(tmp_path, objective, family):
    """Share of digits in a response, from the samples before the first update to those before the last two."""
    model = make_model(family)
    model.generation_config.eos_token_id = 1
    options = {"num_samples": 4} if objective == "ebpo" else {}
    args = DiffusionGRPOConfig(
        str(tmp_path),
        objective=objective,
        objective_kwargs=options,
        scale_rewards="none" if objective in ("gdpo", "stable_drl") else "group",
        num_generations=8,
        per_device_train_batch_size=64,
        max_completion_length=8,
        block_length=4,
        rounds_per_forward=8,
        max_steps=14,
        num_iterations=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **ON_CPU,
    )
    trainer = DiffusionGRPOTrainer(
        model=model,
        reward_funcs=digit_reward,
        args=args,
        train_dataset=make_prompts(16),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert len(rewards) == 7 and rewards[-1] >= rewards[0] + 0.3, rewards
