import pytest
import torch

from dllm_trl.generation.samplers import SAMPLERS, TokenScores, make_sampler, parameters, top_quota
from dllm_trl.generation.samplers.low_confidence_dynamic import LowConfidenceDynamic


def scores_of(probabilities, masked):
    """Scores of greedy tokens for distributions `(B, W, V)`."""
    log_probs = torch.tensor(probabilities).log()[masked]
    return TokenScores(masked, log_probs.max(-1).values, log_probs, lambda: torch.linspace(0.9, 0.1, len(log_probs)))


MASKED = torch.tensor([[True, True, False, True]])
PROBABILITIES = [[[0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [1.0, 0.0, 0.0], [0.6, 0.39, 0.01]]]


@pytest.mark.parametrize(
    "name, quota, expected",
    [
        ("sequential", 2, [0, 1]),
        ("low_confidence_static", 2, [1, 3]),
        ("low_confidence_static", 9, [0, 1, 3]),  # never more than what is masked
        ("low_confidence_static", 0, []),
        ("low_confidence_dynamic", 1, [1]),  # one above the threshold, enough
        ("low_confidence_dynamic", 2, [1, 3]),  # one above the threshold, too few: the quota's best
        ("random", 2, [0, 1]),
        ("entropy", 1, [1]),
        ("entropy", 2, [1, 3]),  # 0.6/0.39/0.01 has 0.71 nats, 0.5/0.3/0.2 has 1.03
        ("margin", 2, [1, 3]),
        ("entropy_bound", 1, [1, 3]),  # 0.39 <= 0.5, then 0.39 + 0.71 > 0.5
        ("entropy_bound", 3, [0, 1, 3]),
    ],
)
def test_strategies(name, quota, expected):
    scores = scores_of(PROBABILITIES, MASKED)
    values = {parameter: field.default for parameter, field in parameters().items()}
    sampler = make_sampler(name, values | {"confidence_threshold": 0.7, "entropy_bound": 0.5})
    commit = sampler(scores, MASKED, torch.tensor([quota]))
    assert commit[0].nonzero()[:, 0].tolist() == expected
    assert not (commit & ~MASKED).any()


def test_margin_and_entropy_rank_differently():
    """Two distributions with the same best probability: margin looks at the second, entropy at all of them."""
    masked = torch.tensor([[True, True]])
    scores = scores_of([[[0.5, 0.25, 0.25, 0.0], [0.5, 0.3, 0.1, 0.1]]], masked)
    quota = torch.tensor([1])
    assert SAMPLERS["margin"](scores, masked, quota).tolist() == [[True, False]]
    assert SAMPLERS["entropy"](scores, masked, quota).tolist() == [[True, False]]
    scores = scores_of([[[0.5, 0.49, 0.01, 0.0], [0.5, 0.2, 0.2, 0.1]]], masked)
    assert SAMPLERS["margin"](scores, masked, quota).tolist() == [[False, True]]
    assert SAMPLERS["entropy"](scores, masked, quota).tolist() == [[True, False]]


def test_ties_go_left_and_the_threshold_is_strict():
    masked = torch.tensor([[False, True, True, True], [True, True, True, True]])
    flat = torch.full((2, 4), 0.25)
    assert top_quota(flat, masked, torch.tensor([2, 1])).tolist() == [
        [False, True, True, False],
        [True, False, False, False],
    ]
    masked = torch.ones(1, 2, dtype=torch.bool)
    scores = TokenScores(masked, torch.tensor([0.75, 0.8]).log(), torch.zeros(2, 2), None)
    commit = LowConfidenceDynamic(0.75)(scores, masked, torch.tensor([1]))
    assert commit.tolist() == [[False, True]]
    commit = LowConfidenceDynamic(0.9)(scores, masked, torch.tensor([0]))
    assert not commit.any()


def test_entropy_takes_zero_probabilities():
    masked = torch.ones(1, 1, dtype=torch.bool)
    scores = scores_of([[[1.0, 0.0, 0.0]]], masked)
    assert scores.entropy.item() == 0
