"""Random masking for reinforcement learning: ratios, masks and likelihood against the published numbers."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_trl.objectives import make_rl_objective
from dllm_trl.objectives.corruptions import random_mask
from dllm_trl.objectives.unigrpo import UniGRPOObjective, unigrpo_ratios, unigrpo_sequence_logp
from dllm_trl.trainers import RandomMaskGRPOTrainer
from dllm_trl.trainers.draws import CountingDraws
from dllm_trl.types import Round

from ..trainers.masked_rl import check_that_it_trains
from .test_corruptions import make_rows


def cases(oracles_dir, name):
    found = json.loads((oracles_dir / f"{name}.json").read_text())["cases"]
    assert found
    return [(SimpleNamespace(**case["inputs"]), case["expected"]) for case in found]


def test_the_ratios_of_the_paper(oracles_dir):
    for given_, expected in cases(oracles_dir, "mask_unigrpo_ratios"):
        found = unigrpo_ratios(torch.tensor([[given_.u0]], dtype=torch.float64), given_.mu)
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=1e-6, atol=0)


def bounds(given_):
    return {name: getattr(given_, name) for name in ("lower", "upper") if hasattr(given_, name)}


def test_the_masks_of_the_reference_for_full_attention(oracles_dir):
    for given_, (masked, ratio) in cases(oracles_dir, "mask_seed_full_random"):
        found = random_mask(torch.tensor([given_.u_tok]), torch.tensor([[given_.u_t]]), **bounds(given_))
        assert found[0][0].tolist() == masked and found[1].item() == pytest.approx(ratio, rel=1e-6)


def test_the_masks_of_the_reference_for_block_attention(oracles_dir):
    for given_, masked in cases(oracles_dir, "mask_seed_block_random"):
        found, _ = random_mask(torch.tensor(given_.u_tok), torch.tensor(given_.u_prob), **bounds(given_))
        assert found.tolist() == masked


def test_the_likelihood_of_the_paper(oracles_dir):
    for given_, expected in cases(oracles_dir, "unigrpo_sequence_logp"):
        logps, masked = torch.tensor([[given_.logp]], dtype=torch.float64), torch.tensor([[given_.mask]])
        assert unigrpo_sequence_logp(logps, masked).item() == pytest.approx(expected, rel=1e-6)
        rounds = [Round(masked[0], masked[0])]
        found = UniGRPOObjective(likelihood="sequence").reduce(logps, rounds)
        assert found.tolist() == [[pytest.approx(expected, rel=1e-6) if m else 0 for m in given_.mask]]


def test_by_hand():
    """Two masks of two responses; the second mask leaves the second response whole."""
    masked = torch.tensor([[[1, 1, 0], [0, 0, 1]], [[0, 1, 0], [0, 0, 0]]]).bool()
    logps = -torch.tensor([[[1.0, 2.0, 9.0], [9.0, 9.0, 3.0]], [[9.0, 4.0, 9.0], [9.0, 9.0, 9.0]]])
    assert unigrpo_sequence_logp(logps, masked).tolist() == [-(1.5 + 4) / 2, -3]
    rounds = [Round(one, one) for one in masked]
    seen = torch.where(masked, logps, 0.0)
    assert UniGRPOObjective().reduce(seen, rounds).tolist() == [[-1, -3, 0], [0, 0, -3]]
    sequences = UniGRPOObjective(likelihood="sequence").reduce(seen, rounds)
    assert sequences.tolist() == [[-2.75, -2.75, 0], [0, 0, -3]]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    views=st.integers(1, 3),
    num_masks=st.integers(1, 3),
    seed=st.integers(0, 1000),
    attention=st.sampled_from(["block", "full"]),
    ratios=st.sampled_from(["spaced", "uniform"]),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
@settings(max_examples=60, deadline=None)
def test_all_that_is_masked_is_scored(lengths, views, num_masks, seed, attention, ratios, bounds):
    rows = make_rows(lengths, [1 + i for i in range(len(lengths))], attention=attention)
    objective = UniGRPOObjective(*bounds, ratios, num_masks, num_views=views)
    rows.draws = objective.draw(rows, CountingDraws(seed, 0))
    unknown = rows.canvas_mask.bool() & ~rows.trained
    for view in range(views):
        rounds = objective.rounds(rows, view)
        assert len(rounds) == num_masks
        for one in rounds:
            assert not (one.scored & ~rows.trained).any() and one.prompt_masked is None
            assert torch.equal(one.masked, one.scored | unknown)


def test_shares_of_masked_tokens():
    """Over updates and masks they are spaced evenly; bounds hold on average over many tokens."""
    rows = make_rows([4000], [1])
    objective = UniGRPOObjective(num_masks=2, num_views=3)
    rows.draws = objective.draw(rows, CountingDraws(3, 0))
    shares = [[one.scored.sum().item() / 4000 for one in objective.rounds(rows, view)] for view in range(3)]
    first = shares[0][0]
    expected = [[(first + view / 6) % 1, (first + view / 6 + 0.5) % 1] for view in range(3)]
    for found, wanted in zip(sum(shares, []), sum(expected, []), strict=True):
        assert abs((found - wanted + 0.5) % 1 - 0.5) < 0.04
    objective = UniGRPOObjective(0.4, 0.5, "uniform", num_views=20)
    rows.draws = objective.draw(rows, CountingDraws(3, 0))
    shares = [objective.rounds(rows, view)[0].scored.sum().item() / 4000 for view in range(20)]
    assert 0.36 < min(shares) < 0.43 and 0.47 < max(shares) < 0.54


@pytest.mark.parametrize("options", [{}, {"ratios": "uniform", "likelihood": "sequence", "num_masks": 2}])
@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_it_trains(tmp_path, family, options):
    check_that_it_trains(tmp_path, RandomMaskGRPOTrainer, family, **options)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"lower": -0.1}, "`lower="),
        ({"upper": 1.1}, "`upper="),
        ({"lower": 0.8, "upper": 0.2}, "`lower=0.8`, `upper=0.2`: must be 0 <= lower <= upper <= 1"),
        ({"ratios": "even"}, "`ratios`"),
        ({"likelihood": "row"}, "`likelihood`"),
        ({"num_masks": 0}, "`num_masks`"),
        ({"size": 2}, "'size'"),
    ],
)
def test_refused_options(options, names):
    with pytest.raises(ValueError, match=names):
        make_rl_objective("random_mask", **options)
