"""Rewards that come as lists: normalised per chunk, put on tokens, and what a step of training makes of them."""

import json
from dataclasses import dataclass

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dllm_trl.objectives import OBJECTIVES, LossOutputs, Objective
from dllm_trl.objectives.trace import TraceObjective
from dllm_trl.rewards import chunk_rewards, judge_vote
from dllm_trl.trainers import DiffusionGRPOConfig, DiffusionGRPOTrainer, TraceRLTrainer
from dllm_trl.trainers.advantages import GroupEstimator
from dllm_trl.trainers.process_rewards import chunk_z_scores, place_chunks, place_lists, place_steps, split_lists

from .test_diffusion_grpo_trainer import make_trainer, roll_out
from .test_distributed import history, launch
from .test_tracerl_trainer import changed, logged, weights
from .tiny_rl import (
    ON_CPU,
    chunk_reward,
    config_class,
    letter_reward,
    make_model,
    make_prompts,
    make_tokenizer,
    rows_of,
)


NAN = float("nan")


def cases(oracles_dir, name):
    return json.loads((oracles_dir / f"{name}.json").read_text())["cases"]


def padded(rows, width=None):
    width = max(len(row) for row in rows) if width is None else width
    return torch.tensor([[*row, *[NAN] * (width - len(row))] for row in rows], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ pure functions


@pytest.mark.parametrize("name", ["process_scores_text", "process_scores_vision"])
def test_fixtures_of_the_scores(oracles_dir, name):
    """Of images, three votes of 0 say nothing."""
    for case in cases(oracles_dir, name):
        inputs = case["inputs"]
        assert inputs.keys() == {"samples", "correct"}
        votes = [
            [judge_vote(chunk, correct, zero_stands=name.endswith("text")) for chunk in chunks]
            for chunks, correct in zip(inputs["samples"], inputs["correct"], strict=True)
        ]
        scores = chunk_z_scores(padded(votes), len(votes))
        torch.testing.assert_close(scores, padded(case["expected"]), rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", ["process_tokens_text", "process_tokens_vision"])
def test_fixtures_of_the_tokens(oracles_dir, name):
    for case in cases(oracles_dir, name):
        inputs = dict(case["inputs"])
        scores = torch.tensor(inputs.pop("scores"), dtype=torch.float64)
        step_map, chunk = torch.tensor(inputs.pop("step_map")), inputs.pop("chunk")
        length, block = inputs.pop("length", len(step_map)), inputs.pop("block_size", None)
        assert not inputs and (block is None) == name.endswith("vision")
        assert place_chunks(scores, step_map, length, chunk, block).tolist() == case["expected"], case["name"]


def test_scores_by_hand():
    """Two groups. Index 0 of the first: 1, -1, and one that is missing; index 1: one response alone has it."""
    scores = padded([[1.0, 0.5], [-1.0], [NAN], [2.0, 3.0], [2.0, 5.0], [2.0]])
    expected = padded([[1.0, 0.5], [-1.0], [NAN], [0.0, -1.0], [0.0, 1.0], [0.0]])
    torch.testing.assert_close(chunk_z_scores(scores, 3), expected, equal_nan=True)


@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_each_index_of_a_group_has_mean_0_and_deviation_1(siblings, groups, width, seed):
    scores = torch.randn(groups * siblings, width, generator=torch.Generator().manual_seed(seed)).double()
    scores[torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.3] = NAN
    found = chunk_z_scores(scores, siblings)
    assert torch.equal(found.isnan(), scores.isnan())
    for group, given_scores in zip(found.split(siblings), scores.split(siblings), strict=True):
        for column, raw in zip(group.T, given_scores.T, strict=True):
            known, raw = column[~column.isnan()], raw[~raw.isnan()]
            if len(known) == 1:
                assert torch.equal(known, raw)
            elif len(known):
                assert abs(known.mean()) < 1e-9 and known.square().mean() == pytest.approx(1)


def test_tokens_by_hand():
    """Chunks of 4, blocks of 2, a response of 6 tokens and what was decoded after it; a missing score; none at all."""
    step_map = torch.tensor([[5, 0, 2, 1, 3, 9, 9, -1]] * 4)
    completed = torch.tensor([[True] * 6 + [False] * 2] * 3 + [[False] * 8])
    scores = torch.tensor([[1.0, 2.0, 7.0], [NAN, 2.0, NAN], [1.0, NAN, NAN], [1.0, 2.0, NAN]])
    expected = torch.zeros(4, 8)
    expected[0, 2], expected[0, 5], expected[1, 5], expected[2, 2] = 1.0, 2.0, 2.0, 1.0
    assert torch.equal(place_lists(scores, step_map, completed, 4, 2), expected)
    # Blocks that are longer than chunks, as with full attention: the chunk counts
    expected[0, 2] = expected[2, 2] = 0.0
    expected[0, 0] = expected[2, 0] = 1.0
    assert torch.equal(place_lists(scores, step_map, completed, 4, 8), expected)
    found = place_lists(scores[:1], step_map[:1], completed[:1], 2, 8)
    assert found[0].tolist() == [1.0, 0.0, 2.0, 0.0, 0.0, 7.0, 0.0, 0.0]


def test_a_number_for_each_step_by_hand():
    step_map = torch.tensor([[2, 0, 2, 7, 7, 9], [1, 1, 0, -1, -1, -1]])
    completed = torch.tensor([[True] * 5 + [False], [True] * 3 + [False] * 3])
    scores = torch.tensor([[1.0, 2.0, NAN], [3.0, NAN, 4.0]])
    expected = torch.tensor([[2.0, 1.0, 2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0, 0.0, 0.0]])
    assert torch.equal(place_lists(scores, step_map, completed, None, 4), expected)
    assert torch.equal(place_steps(scores[:, :1], step_map, completed)[0], (step_map[0] == 0).float())


class TwoProcesses:
    """This one, and another with the same responses and a list that is longer by one."""

    num_processes = 2

    def gather(self, tensor):
        return torch.cat([tensor, tensor])

    def pad_across_processes(self, tensor, dim, pad_index):
        return torch.nn.functional.pad(tensor, (0, 1) if dim == 1 else (0, 0, 0, 1), value=pad_index)


def test_lists_are_parted_from_numbers():
    """Two functions, three responses: lists are added with the weights, and what nobody has stays unknown."""
    rewards = torch.tensor([[1.0, 5.0], [2.0, 0.5], [NAN, 7.0]]).repeat(2, 1)
    lists = [[[1.0, None, 2.0], None, []], [[4.0, None], [0.5], None]]
    numbers, scores = split_lists(TwoProcesses(), rewards, lists, torch.tensor([1.0, 10.0]))
    expected = torch.tensor([[NAN, NAN], [2.0, NAN], [NAN, 7.0]]).repeat(2, 1)
    torch.testing.assert_close(numbers, expected, equal_nan=True)
    expected = torch.tensor([[41.0, NAN, 2.0, NAN], [5.0, NAN, NAN, NAN], [NAN] * 4]).repeat(2, 1)
    torch.testing.assert_close(scores, expected, equal_nan=True)
    assert split_lists(TwoProcesses(), rewards, [[], [None] * 3], torch.ones(2)) == (rewards, None)


# ----------------------------------------------------------------------------------------------------------- a trainer


@dataclass
class OnResponses(TraceObjective):
    def loss(self, inputs):
        return LossOutputs(-(inputs.advantages * inputs.logps.sum(1)).mean())


def family_attention(family):
    return config_class(family).diffusion_attention


async def chunks_later(completion_ids, **kwargs):
    return [[-x for x in one] for one in chunk_reward(completion_ids)]


def mixed_reward(completion_ids, **kwargs):
    """Lists, a number, nothing, a list of nothing, an empty one, tensors."""
    rewards = chunk_reward(completion_ids)
    rewards[1], rewards[2], rewards[3] = 0.25, None, [None] * len(rewards[3])
    rewards[4], rewards[5], rewards[6][0] = [], torch.tensor(rewards[5]), None
    return rewards


def outcome_of(trainer, prompts=(0, 5)):
    """What the estimator was given, and the batch."""
    seen, inner = [], trainer.estimator
    trainer.estimator = lambda outcome: seen.append(outcome) or inner(outcome)
    batch = roll_out(trainer, prompts)
    trainer.estimator = inner
    return seen[0], batch


def returns(rewards, step_map, trained, gamma):
    """Straight from the formula, a token at a time."""
    found = torch.zeros(rewards.shape)
    for row, (r, steps, own) in enumerate(zip(rewards, step_map, trained, strict=True)):
        after = 0.0
        for step in sorted(set(steps[own].tolist()), reverse=True):
            tokens = own & (steps == step)
            found[row, tokens] = r[tokens] + gamma * after
            after = float(r[tokens].mean()) + gamma * after
    return found


@pytest.mark.parametrize("family", ["sdar", "llada"])
@pytest.mark.parametrize(("gamma", "expected"), [(None, 0.99), (0.5, 0.5)])
def test_lists_become_returns_of_tokens(tmp_path, family, gamma, expected):
    options = {"reward_chunk_length": 4, "block_length": 4, "gamma": gamma, "num_iterations": 2, "max_steps": 2}
    trainer = make_trainer(tmp_path, make_model(family), reward_funcs=chunk_reward, learning_rate=1e-2, **options)
    given, batch = outcome_of(trainer)
    rows = rows_of(trainer, batch)
    ids = [row[:n].tolist() for row, n in zip(batch["completion_ids"], batch["completion_mask"].sum(1), strict=True)]
    lists = chunk_reward(ids)
    means = torch.tensor([sum(one) / len(one) for one in lists])
    torch.testing.assert_close(given.rewards[:, 0], means)  # what is logged
    assert given.numbers.isnan().all() and (given.advantages == 0).all()
    torch.testing.assert_close(given.total, means)
    scores = chunk_z_scores(padded(lists), 4)
    placed = place_lists(scores, rows.step_map, batch["completion_mask"].bool(), 4, 4).float()
    torch.testing.assert_close(given.token_rewards, placed)
    assert batch["advantages"].shape == rows.trained.shape
    torch.testing.assert_close(batch["advantages"], returns(placed, rows.step_map, rows.trained, expected))
    assert batch["advantages"][rows.trained].unique().numel() > 8
    before = weights(trainer.model)
    trainer.train()
    assert changed(trainer, before) and all(map(torch.isfinite, map(torch.tensor, logged(trainer, "grad_norm"))))


def test_numbers_beside_lists_lie_on_the_last_step(tmp_path):
    """Numbers are compared as TRL does, lists per chunk; functions that return lists are weighted and added."""
    functions, options = [letter_reward, chunk_reward, chunks_later], {"reward_weights": [2.0, 3.0, 1.0]}
    trainer = make_trainer(tmp_path, reward_funcs=functions, reward_chunk_length=4, gamma=1.0, **options)
    given, batch = outcome_of(trainer)
    alone = make_trainer(tmp_path, reward_funcs=letter_reward, reward_weights=[2.0])
    expected = roll_out(alone)
    assert torch.equal(batch["completion_ids"], expected["completion_ids"])
    torch.testing.assert_close(given.advantages, expected["advantages"])
    two = make_trainer(tmp_path, reward_funcs=chunk_reward, reward_chunk_length=4, gamma=1.0, reward_weights=[2.0])
    lists = roll_out(two)["advantages"]  # z-scores forget the weight, 3 - 1 as well as 2
    trained = rows_of(trainer, batch).trained
    torch.testing.assert_close(batch["advantages"], (lists + expected["advantages"].unsqueeze(1)) * trained)


def test_a_mix_of_numbers_lists_and_nothing(tmp_path):
    trainer = make_trainer(tmp_path, reward_funcs=mixed_reward, reward_chunk_length=4)
    given, batch = outcome_of(trainer)
    assert given.numbers.isnan().tolist() == [True, False, *[True] * 6]
    assert given.rewards[:, 0].isnan().tolist() == [False, False, True, True, True, False, False, False]
    assert given.token_rewards.abs().sum(1)[[1, 2, 3, 4]].tolist() == [0.0] * 4
    assert (given.token_rewards.abs().sum(1)[[5, 7]] > 0).all()
    assert batch["advantages"].isfinite().all()


def test_functions_that_fail_to_judge_anything_still_return_lists(tmp_path, warnings_of):
    def nothing(completion_ids, **kwargs):
        return [[None] * -(-len(ids) // 4) for ids in completion_ids]

    trainer = make_trainer(tmp_path, reward_funcs=[nothing, letter_reward], reward_chunk_length=4, max_steps=1)
    given, batch = outcome_of(trainer)
    assert (given.token_rewards == 0).all() and batch["advantages"].dim() == 2 and batch["advantages"].abs().max() > 0
    trainer.train()
    alone = make_trainer(tmp_path, reward_funcs=nothing, reward_chunk_length=4)
    assert (roll_out(alone)["advantages"] == 0).all()


def test_lists_of_a_number_for_each_step(tmp_path):
    lengths = []

    def steps_reward(completion_ids, **kwargs):
        lengths.extend(map(len, completion_ids))
        return [[float(i), 0.0, 1.0] for i in range(len(completion_ids))]

    trainer = make_trainer(tmp_path, reward_funcs=steps_reward, reward_chunk_length=None, gamma=0.0)
    given, batch = outcome_of(trainer)
    rows = rows_of(trainer, batch)
    scores = chunk_z_scores(torch.tensor([[float(i), 0.0, 1.0] for i in range(8)]), 4)
    first = rows.step_map.masked_fill(~rows.trained, 99).amin(1, keepdim=True)
    expected = torch.where(rows.trained & (rows.step_map == first), scores[:, :1], 0.0)
    torch.testing.assert_close(batch["advantages"], expected)


def test_overlong_responses_and_dropped_groups(tmp_path):
    """An overlong response has 0 for every chunk; accuracy is that of the first function, a list by its mean."""
    options = {"reward_chunk_length": 4, "overlong_slack": 0, "seed": 2}
    trainer = make_trainer(tmp_path, reward_funcs=mixed_reward, **options)
    given, batch = outcome_of(trainer, prompts=(0, 9))
    options["overlong_slack"] = None
    plain, _ = outcome_of(make_trainer(tmp_path, reward_funcs=mixed_reward, **options), prompts=(0, 9))
    last = batch["completion_ids"].gather(1, batch["completion_mask"].sum(1, keepdim=True) - 1).squeeze(1)
    overlong = (batch["completion_mask"].sum(1) == 14) & ~torch.isin(last, torch.tensor(trainer.eos_token_ids))
    assert overlong.any() and not overlong.all()
    known = ~plain.rewards[:, 0].isnan()
    zeroed = make_trainer(tmp_path, reward_funcs=chunk_reward, **options | {"overlong_slack": 0})
    with_zeros, batch = outcome_of(zeroed, prompts=(0, 9))
    ids = [row[:n].tolist() for row, n in zip(batch["completion_ids"], batch["completion_mask"].sum(1), strict=True)]
    lists = [[0.0] * len(one) if late else one for one, late in zip(chunk_reward(ids), overlong, strict=True)]
    scores, step_map = chunk_z_scores(padded(lists), 4).float(), rows_of(zeroed, batch).step_map
    expected = place_lists(scores, step_map, batch["completion_mask"].bool(), 4, zeroed.block_length)
    torch.testing.assert_close(with_zeros.token_rewards, expected)
    assert (given.rewards[overlong & known] == 0).all() and torch.equal(given.rewards.isnan(), plain.rewards.isnan())
    assert torch.equal(given.rewards[~overlong & known], plain.rewards[~overlong & known])

    def second_group_only(completion_ids, **kwargs):
        lists = chunk_reward(completion_ids)
        return [[0.0] * len(one) for one in lists[:4]] + [[1.0, *[0.5] * (len(one) - 1)] for one in lists[4:]]

    functions = [second_group_only, chunk_reward]
    trainer = make_trainer(tmp_path, reward_funcs=functions, accuracy_range=[0.5, 1.0], **options)
    batch = roll_out(trainer)
    trained = rows_of(trainer, batch).trained
    assert not trained[:4].any() and trained[4:].any() and (batch["advantages"][:4] == 0).all()


def test_completions_table_and_metrics_show_numbers(tmp_path):
    options = {"log_completions": True, "max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4}
    trainer = make_trainer(tmp_path, reward_funcs=[chunk_reward, letter_reward], reward_chunk_length=4, **options)
    trainer.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert table[["chunk_reward", "letter_reward", "advantage"]].notna().all().all() and table["advantage"].any()
    for name in ("chunk_reward", "letter_reward"):
        assert logged(trainer, f"rewards/{name}/mean") == pytest.approx([table[name].mean()])
    assert logged(trainer, "reward") == pytest.approx([(table["chunk_reward"] + table["letter_reward"]).mean()])


@pytest.mark.parametrize("chunk_length", [3, None])
def test_lists_of_another_length_are_said_and_cut(tmp_path, warnings_of, chunk_length):
    def too_many(completion_ids, **kwargs):
        return [[1.0] * 20 for _ in completion_ids]

    trainer = make_trainer(tmp_path, reward_funcs=too_many, reward_chunk_length=chunk_length)
    assert roll_out(trainer)["advantages"].isfinite().all() and roll_out(trainer)["advantages"].isfinite().all()
    assert sum("'too_many' in `reward_funcs` returns do not have one number for each" in m for m in warnings_of()) == 1


def test_what_cannot_be_meant(tmp_path):
    def cuts_its_own(completion_ids, **kwargs):
        return chunk_reward(completion_ids)

    cuts_its_own.chunk_tokens = 4
    with pytest.raises(ValueError, match="'cuts_its_own' cuts responses into chunks of 4 .* `reward_chunk_length=4`"):
        make_trainer(tmp_path, reward_funcs=cuts_its_own)
    make_trainer(tmp_path, reward_funcs=cuts_its_own, reward_chunk_length=4)
    for bad in ({"gamma": 1.5}, {"gamma": -0.1}, {"reward_chunk_length": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must"):
            DiffusionGRPOConfig(output_dir=str(tmp_path), **ON_CPU, **bad)
    for value, error in ((float("inf"), "infinite"), ("a", "could not convert")):
        trainer = make_trainer(tmp_path, reward_funcs=lambda completions, v=value, **kwargs: [[v]] * len(completions))
        with pytest.raises(RuntimeError, match=error):
            roll_out(trainer)


def test_nan_in_a_list_is_a_missing_one(tmp_path, warnings_of):
    def undefined(completion_ids, **kwargs):
        lists = chunk_reward(completion_ids)
        lists[0] = [NAN] * len(lists[0])
        return lists

    trainer = make_trainer(tmp_path, reward_funcs=undefined, reward_chunk_length=4)
    given, batch = outcome_of(trainer)
    assert (given.token_rewards[0] == 0).all() and given.rewards[0].isnan().all()
    assert any("'undefined' in `reward_funcs` returned NaN for 1 of 8" in message for message in warnings_of())


@pytest.mark.parametrize("trainer_class", [TraceRLTrainer, DiffusionGRPOTrainer])
@pytest.mark.parametrize("scale_rewards", ["none", "batch", "population"])
def test_lists_with_other_options(tmp_path, trainer_class, scale_rewards):
    options = {"scale_rewards": scale_rewards, "beta": 0.1, "num_iterations": 2, "max_steps": 2}
    options |= {"eval_strategy": "no", "mask_truncated_completions": scale_rewards == "none"}
    trainer = make_trainer(
        tmp_path,
        trainer_class=trainer_class,
        reward_funcs=[chunk_reward, letter_reward],
        reward_chunk_length=4,
        **options,
    )
    before = weights(trainer.model)
    trainer.train()
    assert changed(trainer, before)


def test_lists_are_evaluated_and_resumed(tmp_path):
    """In the middle of a rollout's updates, from a buffer that holds an advantage for each token."""
    options = {
        "reward_chunk_length": 4,
        "num_iterations": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 4,
    }
    options |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 4}
    whole = make_trainer(tmp_path / "whole", reward_funcs=[chunk_reward, letter_reward], **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", reward_funcs=[chunk_reward, letter_reward], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed.model).items())
    metrics = whole.evaluate(make_prompts(5))
    parts = [metrics[f"eval_rewards/{name}/mean"] for name in ("chunk_reward", "letter_reward")]
    assert metrics["eval_reward"] == pytest.approx(sum(parts)) and metrics["eval_loss"] == metrics["eval_loss"]


def test_an_estimator_of_ones_own_gets_both(tmp_path):
    trainer = make_trainer(
        tmp_path,
        reward_funcs=[chunk_reward, letter_reward],
        reward_chunk_length=4,
        estimator=GroupEstimator(gamma=1.0),
    )
    given, _ = outcome_of(trainer)
    assert given.token_rewards is not None and given.numbers.isfinite().all()


@pytest.mark.slow
def test_two_processes_equal_one_with_accumulation(tmp_path):
    """Groups are split over the processes, and the longest response with its many chunks lies in one of them."""
    options = {"per_device_train_batch_size": 2, "max_steps": 2, "save_strategy": "no", "block_length": 4}
    options |= {"chunk_rewards": True, "reward_chunk_length": 4}
    launch(tmp_path / "one", gradient_accumulation_steps=4, **options)
    launch(tmp_path / "two", processes=2, gradient_accumulation_steps=2, **options)
    for name in ("reward", "loss", "grad_norm"):
        one = history(tmp_path / "one", name)
        assert len(one) == 2 and history(tmp_path / "two", name) == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"trace"}))
@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_every_objective_takes_lists(tmp_path, name, family):
    """Losses on whole responses get the mean over their tokens. Widths are those at which a mistake would not show."""
    if family_attention(family) not in OBJECTIVES[name].attentions:
        pytest.skip("for the other kind of attention")
    options = {
        "objective": name,
        "reward_chunk_length": 4,
        "block_length": 4,
        "max_steps": 1,
        "max_completion_length": 8,
    }
    options |= {"remasking_strategy": None, "denoising_steps": None}
    functions = [chunk_reward, letter_reward]
    trainer = make_trainer(tmp_path, make_model(family), DiffusionGRPOTrainer, functions, **options)
    batch = roll_out(trainer)
    assert batch["advantages"].isfinite().all()
    if name not in ("egspo", "lightning_rl"):  # these make advantages of the rewards themselves, of a list's mean
        own = OBJECTIVES[name].loss is not Objective.loss and not OBJECTIVES[name].token_advantages
        assert batch["advantages"].dim() == (1 if own else 2) and batch["advantages"].abs().max() > 0
    before = weights(trainer.model)
    trainer.train()
    assert changed(trainer, before) or name == "lightning_rl"  # which drops all these groups


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_a_critic_takes_lists(tmp_path, family):
    """Its values are 0 at first, so that advantages are the returns; then they are not."""
    options = {"reward_chunk_length": 4, "block_length": 4, "max_steps": 2, "learning_rate": 1e-2}
    functions = [chunk_reward, letter_reward]
    expected = roll_out(make_trainer(tmp_path, make_model(family), reward_funcs=functions, **options))
    options |= {"value_model": "copy", "value_learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, make_model(family), reward_funcs=functions, **options)
    batch = roll_out(trainer)
    torch.testing.assert_close(batch["advantages"], expected["advantages"], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(roll_out(trainer)["advantages"], expected["advantages"], atol=1e-3)
    trainer.train()
    assert logged(trainer, "value/loss")


def test_the_advantage_of_a_response_is_the_mean_over_its_tokens(tmp_path):
    options = {"reward_chunk_length": 4, "max_steps": 1}
    tokens = roll_out(make_trainer(tmp_path, reward_funcs=chunk_reward, **options))
    trainer = make_trainer(tmp_path, None, DiffusionGRPOTrainer, chunk_reward, objective=OnResponses(), **options)
    batch = roll_out(trainer)
    trained = rows_of(trainer, batch).trained
    means = (tokens["advantages"] * trained).sum(1) / trained.sum(1)
    torch.testing.assert_close(batch["advantages"], means)


# ------------------------------------------------------------------------------------------------ models that judge


def reward_model(vocab_size, pad_token_id):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_labels": 1, "initializer_range": 0.5}
    return AutoModelForSequenceClassification.from_config(
        LlamaConfig(vocab_size=vocab_size, pad_token_id=pad_token_id, **sizes)
    ).eval()


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """A reward model with the policy's tokenizer, and one with a vocabulary of its own and without a chat template."""
    root = tmp_path_factory.mktemp("judges")
    for name, tokenizer in (("own", byte_tokenizer()), ("same", make_tokenizer())):
        reward_model(len(tokenizer), tokenizer.pad_token_id).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def byte_tokenizer():
    vocab = {token: i for i, token in enumerate(["<end>", *bytes_to_unicode().values()])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


@pytest.mark.parametrize("name", ["own", "same"])
def test_reward_models_score_whole_responses_and_chunks(tmp_path, judges, name):
    """By name and as a model with its tokenizer; the score after the last chunk is that of the whole response."""
    tokenizer = AutoTokenizer.from_pretrained(judges / name)
    model = AutoModelForSequenceClassification.from_pretrained(judges / name)
    chunks = chunk_rewards(str(judges / name), chunk_tokens=4, policy_tokenizer=make_tokenizer())
    lists = []

    def last_chunk(**kwargs):
        lists.extend(chunks(**kwargs))
        return [one[-1] for one in lists]

    trainer = make_trainer(tmp_path, reward_funcs=[str(judges / name), model, last_chunk])
    assert trainer.reward_processing_classes[0].get_vocab() == tokenizer.get_vocab()
    given, batch = outcome_of(trainer)
    assert given.rewards[:, 0].unique().numel() > 4
    torch.testing.assert_close(given.rewards[:, 1], given.rewards[:, 0])
    torch.testing.assert_close(given.rewards[:, 2], given.rewards[:, 0], atol=1e-5, rtol=1e-5)
    lengths = batch["completion_mask"].sum(1).tolist()
    assert [len(one) for one in lists] == [-(-length // 4) for length in lengths]

    trainer = make_trainer(tmp_path, reward_funcs=[chunks, str(judges / name)], reward_chunk_length=4, max_steps=1)
    assert roll_out(trainer)["advantages"].dim() == 2
    before = weights(trainer.model)
    trainer.train()
    assert changed(trainer, before) and len(logged(trainer, "rewards/chunk_rewards/mean")) == 1
