"""The scorer needs a model, rows and rounds, and no trainer."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from dllm_trl.objectives.trace import TraceObjective, trace_rounds
from dllm_trl.scoring import Scorer
from dllm_trl.types import Grid, Round, Rows
from tests.trainers.tiny_rl import BLOCK, FULL, make_model


def rollout_of(model, temperature=1.0):
    parameters = DiffusionGenerationConfig(
        max_new_tokens=9, do_sample=True, temperature=temperature, block_length=4, denoising_steps=3, eos_token_id=-1
    )
    return generate_rollouts(model, [[10, 11, 12, 13, 14], [20, 21]], parameters, num_generations=2, seed=0)


def scorer_of(model, **options):
    return Scorer(mask_token_id=2, logit_shift=model.config.logit_shift, **options)


@pytest.mark.parametrize("family", BLOCK + FULL)
@pytest.mark.parametrize("head", ["lm", "fused"])
def test_scores_are_what_the_rollout_recorded(family, head):
    model = make_model(family).eval()
    rollout = rollout_of(model, temperature=0.7)
    if head == "fused":
        add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy", "is_top1"))
    rows = rollout.rows()
    with torch.no_grad():
        scores = scorer_of(model, head=head, temperature=0.7)(model, rows, TraceObjective().rounds(rows))
    torch.testing.assert_close(scores.dense("logps").sum(0), rollout.logprobs, atol=1e-5, rtol=0)
    assert (scores.mean("entropies") > 0).equal(rows.trained)
    assert 0 < scores.is_top1.float().mean() <= 1


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_a_critic_gives_a_value_per_scored_token(family):
    model = make_model(family).eval()
    torch.manual_seed(0)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
    rows = rollout_of(make_model(family)).rows()
    rounds = TraceObjective().rounds(rows)
    scorer = scorer_of(model, head="value")
    values = scorer(model, rows, rounds).dense("values")
    assert values.shape == (len(rounds), *rows.canvas_ids.shape) and values.requires_grad
    assert torch.equal(values != 0, torch.stack([r.scored for r in rounds]))


@pytest.mark.parametrize(("most", "expected"), [(None, 4), (4, 4), (7, 7)])
def test_processes_have_as_many_chunks(most, expected):
    """Sharded models gather their weights in step."""
    ids = torch.tensor([[10, 11, 12, 13]])
    rows = Rows(ids, torch.ones_like(ids), ids, torch.ones_like(ids), Grid(None, "response"))
    rounds = trace_rounds(torch.tensor([[0, 1, 2, 3]]), ids > 0)
    asked = []
    largest = None if most is None else lambda count: asked.append(count) or most
    packed = Scorer(mask_token_id=2, rounds_per_forward=1, most=largest).pack(rows, rounds)
    assert len(packed.plan.plans) == expected and packed.shape == (4, 1, 4)
    assert asked == ([] if most is None else [4])


def test_a_token_scored_in_two_rounds_has_two_log_probabilities():
    model = make_model("llada").eval()
    rows = rollout_of(model).rows()
    everything = Round(rows.trained, rows.trained)
    half = rows.trained & (torch.arange(9) % 2 == 0)
    with torch.no_grad():
        scores = scorer_of(model)(model, rows, [everything, Round(half, half)])
    logps = scores.dense("logps")
    assert (logps[1] != 0).equal(half) and not torch.allclose(logps[0][half], logps[1][half])
    mean = scores.mean("logps")
    torch.testing.assert_close(mean[half], logps[:, half].mean(0))
    torch.testing.assert_close(mean[rows.trained & ~half], logps[0][rows.trained & ~half])


def test_unknown_heads_and_rounds_of_other_rows():
    with pytest.raises(ValueError, match="`head` must be one of"):
        Scorer(mask_token_id=2, head="q")
    rows = rollout_of(make_model()).rows()
    wrong = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`objective` must return rounds of the shape \(4, 9\).* has \(1, 3\)"):
        Scorer(mask_token_id=2)(SimpleNamespace(), rows, [Round(wrong, wrong)])
    for nothing in ([], None, rows.trained, [rows.trained]):
        with pytest.raises(ValueError, match="`objective` must return a list of at least one `Round`"):
            Scorer(mask_token_id=2)(SimpleNamespace(), rows, nothing)


def test_prompts_are_masked_alike_in_all_rounds_of_a_view():
    model = make_model("sdar").eval()
    rows = rollout_of(model).rows()
    one, *others = TraceObjective().rounds(rows)
    hidden = rows.prompt_mask.bool() & (torch.arange(rows.prompt_ids.size(1)) % 2 == 0)
    for prompts in ((hidden, None), (hidden, ~hidden)):
        rounds = [replace(r, prompt_masked=p) for r, p in zip((one, others[0]), prompts, strict=True)]
        with pytest.raises(ValueError, match="must return rounds of one view that mask the same prompt tokens"):
            scorer_of(model)(model, rows, rounds)
    with pytest.raises(ValueError, match=r"`prompt_masked` has the shape \(4, 5\) of the prompts.* has \(4, 1\)"):
        scorer_of(model)(model, rows, [replace(one, prompt_masked=hidden[:, :1])])
    shown = replace(rows, prompt_ids=rows.prompt_ids.masked_fill(hidden, 2))
    with torch.no_grad():
        found = scorer_of(model)(model, rows, [replace(r, prompt_masked=hidden) for r in (one, *others)])
        expected = scorer_of(model)(model, shown, [one, *others])
    torch.testing.assert_close(found.logps, expected.logps)
