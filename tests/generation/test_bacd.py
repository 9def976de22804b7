"""BACD: a threshold that follows what a block has committed, against the public numbers and in decoding."""

import json

import pytest
import torch

from dllm_trl.generation.samplers import TokenScores, make_sampler
from dllm_trl.generation.samplers.bacd import BoundedAdaptive

from ..trainers.tiny_rl import make_model


def scores_of(confidences, masked, committed):
    probabilities = confidences[masked].log()
    return TokenScores(masked, probabilities, probabilities[:, None], None, committed_log_probs=committed.log)


def test_oracle_commits(oracles_dir):
    cases = json.loads((oracles_dir / "bacd_commits.json").read_text())["cases"]
    assert cases
    for case in cases:
        inputs, expected = case["inputs"], case["expected"]
        bounds = {f"threshold_{name}": inputs[name] for name in ("lower", "upper") if name in inputs}
        sampler = make_sampler("bacd", bounds)
        masked = torch.tensor([inputs["masked"]])
        committed = torch.full(masked.shape, torch.nan)
        thresholds, commits = [], []
        for confidences in torch.tensor(inputs["confidences"])[: len(expected["commits"])]:
            scores = scores_of(confidences[None], masked, committed)
            thresholds.append(sampler.threshold(scores, masked).item())
            commit = sampler(scores, masked, torch.ones(1, dtype=torch.long))
            commits.append(commit[0].tolist())
            committed = torch.where(commit, confidences, committed)
            masked = masked & ~commit
        assert commits == expected["commits"] and not masked.any()
        assert thresholds == pytest.approx(expected["thresholds"], rel=1e-6)


def test_blocks_follow_their_own():
    """Two blocks at different steps in one batch; the quota is kept."""
    masked = torch.tensor([[True, True, True], [False, True, True]])
    confidences = torch.tensor([[0.7, 0.65, 0.7], [0.1, 0.7, 0.86]])
    committed = torch.tensor([[torch.nan] * 3, [0.85, torch.nan, torch.nan]])
    scores = scores_of(confidences, masked, committed)
    commit = BoundedAdaptive()(scores, masked, torch.tensor([1, 1]))
    assert commit.tolist() == [[True, False, True], [False, False, True]]
    commit = BoundedAdaptive()(scores, masked, torch.tensor([3, 2]))
    assert torch.equal(commit, masked)


def test_bounds_are_checked():
    for wrong in ((-0.1, 0.9), (0.9, 0.6), (0.6, 1.1)):
        with pytest.raises(ValueError, match="probabilities in"):
            BoundedAdaptive(*wrong)


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_decoding_tells_what_was_committed(family):
    """The recorded log-probabilities are those of the threshold: replayed from them, the steps are the decoder's."""
    model = make_model(family).eval()
    prompt = torch.tensor([[10, 11, 12, 13, 14], [0, 0, 20, 21, 22]])
    options = {"block_length": 8, "max_new_tokens": 16, "eos_token_id": -1, "return_dict_in_generate": True}
    options |= {"remasking_strategy": "bacd", "threshold_lower": 0.05, "threshold_upper": 0.2}
    together = model.generate(prompt, attention_mask=(prompt > 0).long(), **options)
    for row, ids in enumerate((prompt[:1], prompt[1:, 2:])):
        alone = model.generate(ids, **options)  # what one block has committed is nothing to another
        assert torch.equal(alone.step_map[0], together.step_map[row, : alone.step_map.size(1)])
    steps, confidence = together.step_map, together.logprobs.exp()
    assert steps.amax(1).min() < 15  # some steps committed several
    start = torch.tensor([5, 3]) if family == "sdar" else torch.zeros(2, dtype=torch.long)
    for row in range(2):
        block = (torch.arange(16) + start[row]) // 8
        for number in block.unique():
            mine = block == number
            for step in steps[row][mine].unique()[1:]:
                before, now = (mine & (steps[row] < step)), mine & (steps[row] == step)
                threshold = confidence[row][before].mean().clamp(0.05, 0.2)
                assert now.sum() == 1 or (confidence[row][now] >= threshold - 1e-6).all()
