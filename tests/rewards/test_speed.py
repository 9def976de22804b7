import pytest

from dllm_trl.rewards import format_reward, speed_reward
from dllm_trl.trainers.constructor_checks import check_reward_columns
from tests.trainers.test_diffusion_grpo_trainer import make_trainer
from tests.trainers.tiny_rl import make_model, make_prompts


def test_tokens_per_forward_are_the_reward():
    messages = [[{"role": "assistant", "content": "4"}], [{"role": "assistant", "content": "5"}]]
    assert speed_reward(messages, tokens_per_forward=[1.5, 2], prompts=["a", "b"]) == [1.5, 2.0]
    with pytest.raises(ValueError, match="`tokens_per_forward` must have one entry per completion"):
        speed_reward(["4"], tokens_per_forward=[1.0, 2.0])


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_rewards_know_what_the_rollout_knows(tmp_path, family):
    seen = []

    def watching(completions, completion_ids, tokens_per_forward, num_forward_passes, answer, **kwargs):
        seen.append((completion_ids, tokens_per_forward, num_forward_passes, trainer._generation.rollout))
        return [0.0] * len(completions)

    options = {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.2}
    options |= {"denoising_steps": 4, "block_length": 4, "max_steps": 1}
    trainer = make_trainer(tmp_path, make_model(family), reward_funcs=[speed_reward, watching], **options)
    trainer.train()
    (ids, speeds, forwards, rollout), *_ = seen
    assert forwards == rollout.num_forward_passes.tolist() and all(isinstance(number, int) for number in forwards)
    committed = (rollout.step_map >= 0).sum(1).tolist()
    assert speeds == pytest.approx([tokens / number for tokens, number in zip(committed, forwards, strict=True)])
    assert len(set(speeds)) > 1 and all(len(own) <= tokens for own, tokens in zip(ids, committed, strict=True))
    assert trainer.state.log_history[0]["rewards/speed_reward/mean"] == pytest.approx(sum(speeds) / len(speeds))


def test_a_column_of_that_name_is_refused():
    dataset = make_prompts().add_column("tokens_per_forward", [1.0] * 17)
    with pytest.raises(ValueError, match=r"`train_dataset` has the columns \['tokens_per_forward'\]"):
        check_reward_columns([format_reward], "train_dataset", dataset)
    check_reward_columns(speed_reward, "train_dataset", make_prompts())  # demands what only the trainer passes
