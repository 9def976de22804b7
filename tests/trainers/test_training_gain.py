"""Every family learns: fine-tuning halves its loss, TraceRL raises its reward by 20 points and more."""

import pytest
from datasets import Dataset

from dllm_trl import DiffusionSFTConfig, DiffusionSFTTrainer, TraceRLConfig, TraceRLTrainer

from .tiny_rl import ON_CPU, TINY, make_model, make_prompts, make_tokenizer


OPTIONS = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    **ON_CPU,
}


def digit_reward(completions, **kwargs) -> list[float]:
    """Share of digits."""
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]


@pytest.mark.parametrize("family", TINY)
def test_sft_halves_the_loss(tmp_path, family):
    """With the family's default objective, on the same noise before and after."""
    examples = Dataset.from_dict(
        {"prompt": [f"{i}*2=" for i in range(8)], "completion": [f"{2 * i}!" for i in range(8)]}
    )
    trainer = DiffusionSFTTrainer(
        model=make_model(family),
        args=DiffusionSFTConfig(
            str(tmp_path), max_length=32, max_steps=60, per_device_train_batch_size=8, eval_strategy="no", **OPTIONS
        ),
        train_dataset=examples,
        eval_dataset=examples,
        processing_class=make_tokenizer(),
    )
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 2


@pytest.mark.parametrize("family", TINY)
def test_tracerl_raises_the_reward(tmp_path, family):
    """From the samples before the first update to those before the last."""
    model = make_model(family)
    model.generation_config.eos_token_id = 1
    args = TraceRLConfig(
        str(tmp_path),
        num_generations=8,
        per_device_train_batch_size=64,
        max_completion_length=8,
        block_length=4,
        denoising_steps=2,
        remasking_strategy="low_confidence_static",
        shrink=2,
        rounds_per_forward=8,
        max_steps=8,
        **OPTIONS,
    )
    trainer = TraceRLTrainer(
        model=model,
        reward_funcs=digit_reward,
        args=args,
        train_dataset=make_prompts(16),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert len(rewards) == 8 and rewards[-1] >= rewards[0] + 0.2, rewards
