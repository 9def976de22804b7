"""JustGRPO and its wide form against the public numbers, by hand, and in training."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_trl.objectives import OBJECTIVES
from dllm_trl.objectives.block_reveal import BlockRevealObjective
from dllm_trl.objectives.just_grpo import JustGRPOObjective, just_grpo_loss, num_informative
from dllm_trl.objectives.leftmost import leftmost_rounds
from dllm_trl.objectives.trace import trace_rounds
from dllm_trl.types import Grid

from ..trainers.test_diffusion_grpo_trainer import replay, roll_out
from ..trainers.tiny_rl import BLOCK, FULL, rows_of, score
from .in_training import cases, check_learns, check_ratio_is_one, exact, trainer_of


BLANK = {"remasking_strategy": None, "denoising_steps": None}  # what the objective fills in


def blocks_of(block_length, first_len, width):
    """Blocks of a response whose first one has `first_len` tokens."""
    prompt_mask = torch.arange(block_length)[None] < block_length - (first_len or block_length)
    return Grid(block_length).canvas_blocks(prompt_mask.long(), width)


def test_rounds(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "justgrpo_rounds"):
        exists = torch.ones(1, inputs["length"], dtype=torch.bool)
        trained = ~torch.tensor([inputs.get("is_pad", [False] * inputs["length"])])
        blocks = inputs["block_length"] and blocks_of(inputs["block_length"], inputs["first_len"], inputs["length"])
        rounds = leftmost_rounds(exists, trained, blocks=blocks, width=inputs["k"])
        ours = [{"masked": r.masked[0].nonzero().flatten().tolist()} for r in rounds]
        ours = [one | {"loss": r.scored[0].nonzero().flatten().tolist()} for one, r in zip(ours, rounds, strict=True)]
        assert ours == expected, name


def test_loss(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "justgrpo_loss"):
        new, old, adv, scored = (exact(inputs[k]) for k in ("logp_new", "logp_old", "adv", "scored"))
        eps, size = inputs["eps"], inputs["max_length"] * num_informative(adv, inputs["processes"])
        loss = just_grpo_loss(new - old, adv.unsqueeze(1), scored, eps, eps, size)
        assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-9), name


def test_by_hand():
    """A response of three tokens, the last of them beyond EOS, behind a prompt that fills three of four places."""
    rounds = leftmost_rounds(torch.tensor([[True] * 3]), torch.tensor([[True, True, False]]))
    assert [r.masked.tolist() for r in rounds] == [[[True, True, True]], [[False, True, True]]]
    assert [r.scored.tolist() for r in rounds] == [[[True, False, False]], [[False, True, False]]]
    rounds = leftmost_rounds(torch.tensor([[True] * 3]), torch.tensor([[True] * 3]), blocks=torch.tensor([[0, 1, 1]]))
    assert [r.scored.tolist() for r in rounds] == [[[True, True, False]], [[False, False, True]]]
    # Ratios 1.5 and 0.5 of a good and a bad response and a third that is neither: 1.2 and 0.8 remain
    ratios = torch.tensor([[1.5], [0.5], [9.0]]).log()
    loss = just_grpo_loss(ratios, torch.tensor([[1.0], [-1.0], [0.0]]), torch.ones(3, 1) > 0, 0.2, 0.2, 10 * 2)
    assert loss.item() == pytest.approx(-(1.2 - 0.8) / (10 * 2))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(1, 8), st.integers(1, 9), st.data())
def test_rounds_score_every_token_once(lengths, block_length, width, data):
    """In full attention and on any grid; and a width of the block is one round."""
    size = max(*lengths, 1)
    exists = torch.arange(size) < torch.tensor(lengths)[:, None]
    trained = exists & torch.tensor([[data.draw(st.booleans()) for _ in range(size)] for _ in lengths])
    first = data.draw(st.integers(1, block_length))
    blocks = blocks_of(block_length, first, size).expand(len(lengths), -1)
    for grid in (None, blocks):
        rounds = leftmost_rounds(exists, trained, blocks=grid, width=width)
        assert torch.equal(sum(r.scored.int() for r in rounds), trained.int())
        assert len(rounds) <= -(-(size if grid is None else block_length) // width)
        for row in range(len(lengths)):  # whatever the other rows are
            mine = slice(row, row + 1)
            alone = leftmost_rounds(
                exists[mine], trained[mine], blocks=None if grid is None else grid[mine], width=width
            )
            assert all(torch.equal(a.masked, r.masked[mine]) for a, r in zip(alone, rounds, strict=False))
    (one,) = leftmost_rounds(exists, trained, blocks=blocks, width=block_length)
    assert torch.equal(one.masked, exists) and torch.equal(one.scored, trained)


@given(st.integers(1, 20), st.integers(1, 8), st.data())
def test_rounds_are_those_of_a_trace_from_left_to_right(length, block_length, data):
    """`step_map` = place in the block // width, which is what TraceRL's rounds make of such a rollout."""
    blocks = blocks_of(block_length, data.draw(st.integers(1, block_length)), length)
    width = data.draw(st.integers(1, block_length))
    place = torch.arange(length) - torch.searchsorted(blocks[0].contiguous(), blocks[0].contiguous())
    everything = torch.ones(1, length, dtype=torch.bool)
    ours = leftmost_rounds(everything, everything, blocks=blocks, width=width)
    theirs = trace_rounds((place // width)[None], everything, blocks=blocks)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.masked, other.masked) and torch.equal(one.scored, other.scored)


KINDS = [*(("just_grpo", {}, family) for family in (*BLOCK, *FULL))]
KINDS += [("block_reveal", {"width": width}, family) for width, family in zip((2, 4, 9, 2, 4), BLOCK, strict=False)]


@pytest.mark.parametrize(("name", "options", "family"), KINDS)
def test_trainer_scores_what_the_rollout_saw(tmp_path, name, options, family):
    """Every family: the log-probabilities of the rollout, of the trainer, and of a replay block by block."""
    trainer = trainer_of(
        tmp_path, family, name, objective_kwargs=options, on_policy_check="error", seed=2, temperature=0.9, **BLANK
    )
    assert trainer.generation_config.remasking_strategy == "sequential"
    batch = roll_out(trainer, prompts=(0, 5, 9))
    rows = rows_of(trainer, batch)
    assert (rows.trained.sum(1) < rows.canvas_mask.sum(1)).any()  # some end early
    logps = score(trainer, rows)[0].detach()
    torch.testing.assert_close(logps, batch["sampling_per_token_logps"] * rows.trained, atol=1e-5, rtol=0)
    torch.testing.assert_close(logps, replay(trainer, rows), atol=1e-5, rtol=0)


def test_a_width_that_does_not_divide_the_block_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`width` must divide `block_length`"):
        trainer_of(tmp_path, "sdar", BlockRevealObjective(width=3), **BLANK)
    with pytest.raises(ValueError, match="block attention"):
        trainer_of(tmp_path, "llada", "block_reveal", **BLANK)
    with pytest.raises(ValueError, match="`width`"):
        BlockRevealObjective(width=0)


def test_a_rollout_in_another_order_is_said(tmp_path, caplog):
    """It trains all the same, and nobody compares the rollout's log-probabilities with those of other contexts."""
    with caplog.at_level(logging.WARNING):
        trainer = check_learns(tmp_path, "sdar", "just_grpo", steps=1)
    assert "contexts that the rollout did not see" in caplog.text
    assert trainer.generation_config.remasking_strategy == "low_confidence_static"
    assert "sampling_per_token_logps" not in roll_out(trainer)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path, "sdar", "just_grpo", **BLANK)
    assert "contexts" not in caplog.text


@pytest.mark.parametrize(("name", "family"), [("just_grpo", "sdar"), ("just_grpo", "llada"), ("block_reveal", "sdar")])
def test_it_trains(tmp_path, name, family):
    trainer = check_learns(tmp_path, family, name, beta=0.04, num_iterations=2, on_policy_check="error", **BLANK)
    assert type(trainer.objective) is OBJECTIVES[name]


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_the_old_policy_is_scored_in_the_same_contexts(tmp_path, family):
    check_ratio_is_one(tmp_path, family, JustGRPOObjective(), **BLANK)


def test_the_normaliser_is_that_of_the_whole_step(tmp_path):
    """However its rows are split: the sum over all tokens over the length times the number of those with a signal."""

    def reward(completions, **kwargs):  # one of two groups is of no use
        return [len(set(text)) * (number < 4) / 10 for number, text in enumerate(completions)]

    seen = {}
    for size in (8, 4, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        trainer = trainer_of(tmp_path, "sdar", JustGRPOObjective(10), reward_funcs=reward, **options, **BLANK)
        if size == 8:
            batch = roll_out(trainer)
            batch["rows/trained"][0, 5:] = False  # with equal lengths the sum would be 0
            rows, worth = rows_of(trainer, batch), batch["advantages"]
            assert (worth != 0).sum() == 4
            # TRL's are z-scores, here times 8 / 4
            assert worth.square().sum().item() == pytest.approx(3 * 2**2, rel=0.01)
            whole = trainer._compute_loss(trainer.model, batch).item()
            assert whole == pytest.approx(-(worth / 2 * rows.trained.sum(1)).sum().item() / (10 * 4), rel=1e-4)
        trainer.train()
        seen[size] = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    for size in (4, 2):
        for name in seen[8]:
            torch.testing.assert_close(seen[size][name], seen[8][name], atol=1e-6, rtol=1e-4)
