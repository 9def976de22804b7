"""diffu-GRPO: masks and loss against the published numbers; prompts that are masked in part."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dllm_trl.objectives import make_rl_objective
from dllm_trl.objectives.diffu_grpo import DiffuGRPOObjective
from dllm_trl.scoring import Scorer
from dllm_trl.trainers import DiffusionGRPOTrainer, RandomMaskGRPOTrainer
from dllm_trl.trainers.draws import CountingDraws
from dllm_trl.types import Grid, Rows

from ..trainers.masked_rl import check_that_it_trains, loss_of
from ..trainers.tiny_rl import FULL, TINY, make_model
from .test_corruptions import make_rows


MASK = 2


def cases(oracles_dir, name):
    found = json.loads((oracles_dir / f"{name}.json").read_text())["cases"]
    assert found
    return [(SimpleNamespace(**case["inputs"]), case["expected"]) for case in found]


class Given:
    """Numbers that were drawn before."""

    def __init__(self, numbers):
        self.numbers = torch.tensor([numbers])

    def uniform(self, where):
        return self.numbers * where


@pytest.mark.parametrize("attention", ["block", "full"])
def test_the_masks_of_the_paper(oracles_dir, attention):
    for given, expected in cases(oracles_dir, "mask_d1"):
        prompt, width = torch.ones(1, given.prompt_len).long(), len(given.u) - given.prompt_len
        canvas = torch.ones(1, width).long()
        rows = Rows(prompt, prompt, canvas, canvas, Grid.of(attention, 4))
        objective = DiffuGRPOObjective(given.p_prompt)
        rows.draws = objective.draw(rows, Given(given.u[: given.prompt_len]))
        (one,) = objective.rounds(rows)
        assert one.prompt_masked[0].tolist() + one.masked[0].tolist() == expected
        assert one.scored.all()


def test_the_loss_of_the_paper(tmp_path, monkeypatch, oracles_dir):
    """A mean over tokens: TRL's `dapo` over an optimizer step, or `bnpo` over a micro-batch."""
    for given, expected in cases(oracles_dir, "diffu_grpo_loss"):
        for loss_type in ("dapo", "bnpo"):
            options = {"epsilon": given.eps, "beta": given.beta, "objective": "diffu_grpo", "loss_type": loss_type}
            found = loss_of(tmp_path, monkeypatch, RandomMaskGRPOTrainer, given, **options)
            assert found == pytest.approx(expected, rel=1e-6)


def random_rows(attention):
    """Two responses behind prompts of 6 and 3 tokens, the shorter padded on the left."""
    rows = make_rows([5, 7], [6, 3], attention=attention)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(6, 40, tensor.shape, generator=generator) for tensor in (rows.prompt_ids, rows.canvas_ids)]
    return replace(rows, prompt_ids=ids[0], canvas_ids=ids[1])


def test_a_prompt_is_masked_the_same_however_it_is_padded():
    one, other = make_rows([3, 3], [5, 2]), make_rows([3, 3], [5, 2], pad=3)
    objective = DiffuGRPOObjective(0.5, num_views=2)
    drawn = [objective.draw(rows, CountingDraws(1, 0))["prompt"] for rows in (one, other)]
    for row, length in enumerate((5, 2)):
        assert torch.equal(drawn[0][row, :, -length:], drawn[1][row, :, -length:])
        assert not drawn[0][row, :, :-length].any() and not drawn[1][row, :, :-length].any()
    assert drawn[0].any() and not drawn[0][one.prompt_mask.bool().unsqueeze(1).expand(-1, 2, -1)].all()
    assert not torch.equal(*drawn[0].unbind(1))


@pytest.mark.parametrize("family", TINY)
def test_scores_are_those_behind_the_masked_prompt(family):
    """Against a plain forward of each row, and of each block in block attention, behind the prompt as it is seen."""
    attention = "full" if family in FULL else "block"
    model, rows = make_model(family).eval(), random_rows(attention)
    objective = DiffuGRPOObjective(0.5)
    rows.draws = objective.draw(rows, CountingDraws(0, 0))
    rounds = objective.rounds(rows)
    assert rounds[0].prompt_masked.any(1).all() and rows.grid.attention == attention
    shift = model.config.logit_shift
    with torch.no_grad():
        found = Scorer(MASK, shift)(model, rows, rounds).dense("logps")[0]
        expected = torch.zeros_like(found)
        for row in range(2):
            prompt = rows.prompt_ids[row].masked_fill(rounds[0].prompt_masked[row], MASK)
            prompt = prompt[rows.prompt_mask[row].bool()]
            canvas = rows.canvas_ids[row][rows.canvas_mask[row].bool()]
            whole, start = torch.cat([prompt, canvas]), len(prompt)
            blocks = torch.arange(len(whole)) // 4 if attention == "block" else torch.zeros(len(whole))
            for block in blocks[start:].unique():
                mine = (blocks == block) & (torch.arange(len(whole)) >= start)
                seen = whole.masked_fill(mine, MASK)[blocks <= block]
                call = {"block_length": 4} if attention == "block" else {}
                logps = model(input_ids=seen[None], **call).logits[0].log_softmax(-1)
                for position in mine.nonzero().flatten().tolist():
                    if rows.trained[row, position - start]:
                        expected[row, position - start] = logps[position - shift, whole[position]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    unmasked = replace(rows, draws={"prompt": torch.zeros_like(rows.draws["prompt"])})
    with torch.no_grad():
        other = Scorer(MASK, shift)(model, unmasked, objective.rounds(unmasked)).dense("logps")[0]
    assert ((other - found).abs() > 1e-4)[rows.trained].any()


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_it_trains(tmp_path, family):
    options = {"objective": "diffu_grpo", "prompt_mask_prob": 0.4, "scale_rewards": "none"}
    check_that_it_trains(tmp_path, RandomMaskGRPOTrainer, family, **options)


def test_it_trains_by_its_name(tmp_path):
    check_that_it_trains(
        tmp_path, DiffusionGRPOTrainer, "sdar", objective="diffu_grpo", objective_kwargs={"prompt_mask_prob": 0.4}
    )


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.5", None])
def test_refused_options(value):
    with pytest.raises(ValueError, match="`prompt_mask_prob=.*`: must be 0 <= prompt_mask_prob <= 1"):
        make_rl_objective("diffu_grpo", prompt_mask_prob=value)
