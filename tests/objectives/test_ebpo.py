"""EBPO against the numbers of public code, by hand, and in training."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_trl.objectives.block_noise import block_sums, ebpo_counts, ebpo_mask
from dllm_trl.objectives.ebpo import EBPOObjective, ebpo_loss, ebpo_round
from dllm_trl.types import Grid, Rows

from .in_training import cases, check_learns, check_ratio_is_one, exact


FAMILIES = pytest.mark.parametrize("family", ["sdar", "llada"])


def blocks_of(sizes, width):
    """Blocks `(1, width)` of a response of blocks of these sizes; what comes after them is of the last."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor([*sizes[:-1], sizes[-1] + width - sum(sizes)]))[
        None
    ]


def test_mask_counts(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "ebpo_mask_counts"):
        sizes = torch.tensor([sum(inputs["block_sizes"], [])])  # the blocks of the whole batch
        counts = ebpo_counts(sizes, torch.tensor([[inputs["u"]]], dtype=torch.double))[0].tolist()
        assert counts == sum(expected, []), name


def test_elbo(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "ebpo_elbo"):
        logps, masks = exact(inputs["lp"])[:, None], exact(inputs["mask"])[:, None]
        trained = torch.arange(logps.size(2))[None] < sum(inputs["block_sizes"])
        blocks = blocks_of(inputs["block_sizes"], logps.size(2))
        shares = inputs["weights"] or [1 / len(masks)] * len(masks)
        rounds = [ebpo_round(m & trained, trained, blocks, share) for m, share in zip(masks, shares, strict=True)]
        scored = logps * torch.stack([r.scored for r in rounds])
        assert EBPOObjective().reduce(scored, rounds).sum().item() == pytest.approx(expected, rel=1e-6), name


def test_loss(oracles_dir):
    for inputs, expected, name in cases(oracles_dir, "ebpo_loss"):
        rows = [exact(inputs[key]) for key in ("elbo_new", "elbo_old", "elbo_ref", "adv", "valid")]
        options = (inputs["eps_low"], inputs["eps_high"], inputs["beta"], inputs["kl"])
        loss = ebpo_loss(*rows, sum(inputs["valid"]), *options)
        assert loss.item() == pytest.approx(expected, rel=1e-6), name


def test_by_hand():
    """Blocks of 1, 4 and 2 tokens, noise from 0.5 on: 0.5, 0.83 and 0.17 mask 1, 4 and 1 of them."""
    trained, blocks = torch.ones(1, 7, dtype=torch.bool), blocks_of([1, 4, 2], 7)
    counts = ebpo_counts(block_sums(trained, blocks), torch.tensor([[0.5]]))
    assert counts.tolist() == [[1, 4, 1]]
    mask = ebpo_mask(counts, trained, blocks, torch.tensor([[0.9, 0.1, 0.2, 0.3, 0.4, 0.6, 0.5]]))
    assert mask.tolist() == [[True, True, True, True, True, False, True]]
    round_ = ebpo_round(mask, trained, blocks, 0.5)
    assert (round_.loss_weight * round_.scored).tolist() == [[0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 1.0]]
    # A ratio of exp(0.1) of a good response, one of exp(30) of one that is worth nothing, and one beyond of a bad one
    elbo, worth = torch.tensor([0.1, 30.0, 500.0], requires_grad=True), torch.tensor([1.0, 0.0, -1.0])
    loss = ebpo_loss(elbo, torch.zeros(3), None, worth, torch.tensor([True, True, False]), 2, 0.2, 0.2)
    assert loss.item() == pytest.approx(-math.exp(0.1) / 2)
    loss.backward()
    assert elbo.grad.tolist() == pytest.approx([-math.exp(0.1) / 2, 0, 0])


@pytest.mark.parametrize("difference", [1e3, -1e3, 1e6])
@pytest.mark.parametrize("worth", [1.0, -1.0, 0.0])
def test_nothing_overflows(difference, worth):
    """Hundreds of tokens: the ratio leaves the clipping range at once, on either side; no number does."""
    elbo = torch.tensor([difference], requires_grad=True)
    loss = ebpo_loss(elbo, torch.zeros(1), None, torch.tensor([worth]), torch.tensor([True]), 1, 0.2, 0.2)
    loss.backward()
    assert loss.isfinite() and elbo.grad.item() == 0.0
    if worth * difference >= 0:
        assert loss.item() == pytest.approx(-1.2 * worth if difference > 0 else -0.8 * worth)


@given(st.lists(st.integers(0, 17), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 5), st.integers(0, 99))
def test_every_block_is_masked_in_part(lengths, block_length, prompt, seed):
    """At least one token of each block that has any, no other; weights restore the block; rows are on their own."""
    width, generator = max(*lengths, 1), torch.Generator().manual_seed(seed)
    trained = torch.arange(width) < torch.tensor(lengths)[:, None]
    ones, prompts = torch.ones_like(trained).long(), torch.ones(len(lengths), prompt, dtype=torch.long)
    objective = EBPOObjective(num_samples=3)
    draws = {f"start{i}": torch.rand(len(lengths), 1, generator=generator) for i in range(3)}
    draws |= {f"mask{i}": torch.rand(trained.shape, generator=generator) for i in range(3)}
    for grid in (Grid(block_length), Grid(block_length, "response"), Grid(None, "response")):
        rows = Rows(prompts, prompts, ones, ones, grid, trained, draws=draws)
        rounds, blocks = objective.rounds(rows), rows.blocks - rows.blocks[:, :1]
        for round_ in rounds:
            assert torch.equal(block_sums(round_.masked, blocks) > 0, block_sums(trained, blocks) > 0)
            assert torch.equal(round_.masked, round_.scored) and not (round_.masked & ~trained).any()
        total = sum(r.scored * r.loss_weight for r in rounds).sum(1)
        torch.testing.assert_close(total, torch.tensor(lengths).float(), rtol=1e-5, atol=1e-5)
        alone = [objective.rounds(rows[row : row + 1]) for row in range(len(lengths))]
        for number, round_ in enumerate(rounds):
            assert torch.equal(torch.cat([own[number].masked for own in alone]), round_.masked)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.floats(0, 1, exclude_max=True))
def test_levels_are_spread_evenly(sizes, start):
    """Large blocks, of which a share of the tokens can be told: one lies in each stratum of 1/M."""
    counts = ebpo_counts(torch.tensor([[10**6] * len(sizes)]), torch.tensor([[start]], dtype=torch.double))[0]
    levels = sorted(((counts - 1) / 10**6 - start * 1.0).remainder(1 / len(sizes)).tolist())
    assert all(min(level, 1 / len(sizes) - level) < 1e-5 for level in levels) and counts.unique().numel() == len(sizes)


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"kl": "k4"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        EBPOObjective(**options)


@FAMILIES
def test_it_trains(tmp_path, family):
    trainer = check_learns(tmp_path, family, "ebpo", objective_kwargs={"num_samples": 2}, beta=0.04, num_iterations=2)
    assert trainer.objective == EBPOObjective(num_samples=2)


@FAMILIES
def test_the_same_masks_for_old_and_new(tmp_path, family):
    check_ratio_is_one(tmp_path, family, EBPOObjective(num_samples=2))
