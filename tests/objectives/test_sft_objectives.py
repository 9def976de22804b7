"""Random masking, semi-autoregressive, autoregressive and trace SFT against the published numbers."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from dllm_trl.objectives import SFT_OBJECTIVES, make_sft_objective
from dllm_trl.objectives.ar import AutoregressiveObjective
from dllm_trl.objectives.block_mask import BlockObjective
from dllm_trl.objectives.cart import cart_weights
from dllm_trl.objectives.random_mask import RandomMaskObjective
from dllm_trl.objectives.semi_ar import SemiAutoregressiveObjective, slice_round, slices_of
from dllm_trl.objectives.trace import TraceObjective
from dllm_trl.trainers.documents import unpack_rows
from dllm_trl.trainers.draws import CountedDraws, PooledDraws
from dllm_trl.trainers.sft_loss import sft_loss
from dllm_trl.types import Grid, Rows

from .test_block_mask import padded


EOS = 9


def cases(oracles_dir, name):
    found = json.loads((oracles_dir / f"{name}.json").read_text())["cases"]
    assert found
    return [(SimpleNamespace(**case["inputs"]), case["expected"]) for case in found]


FULL = Grid(None, "response")


def rows_of(trained, step_map=None):
    """Rows whose first token is the prompt."""
    trained = torch.as_tensor(trained)
    prompt = torch.ones(len(trained), 1, dtype=torch.long)
    ids = torch.arange(trained.numel()).view(trained.shape) + 10
    return Rows(prompt, prompt, ids, torch.ones_like(ids), FULL, trained, step_map)


def with_draws(objective, rows, levels=(), uniform=()):
    """The rows with what the objective draws, of these numbers in the order of the rows."""
    draws = objective.draw(rows, PooledDraws(torch.as_tensor(levels), torch.as_tensor(uniform)))
    return dataclasses.replace(rows, draws=draws)


def loss_of(objective, nll, masked, trained, probability, loss_norm):
    """The loss of an objective that is made to mask `masked`, with one mask probability per row."""
    level = (torch.tensor(probability) - objective.eps) / (objective.largest - objective.eps)
    uniform = torch.where(masked, 0.0, 2.0)[trained]
    (round_,) = objective.rounds(with_draws(objective, rows_of(trained), level, uniform))
    assert torch.equal(round_.scored, masked)
    weight = torch.ones_like(nll) if round_.loss_weight is None else round_.loss_weight
    rows, columns = masked.nonzero(as_tuple=True)
    return sft_loss(nll[rows, columns], weight[rows, columns], rows, trained.sum(1), loss_norm).item()


def after_prompts(inputs):
    return torch.arange(len(inputs.nll[0])) >= torch.tensor(inputs.prompt_len)[:, None]


def test_oracle_llada_loss(oracles_dir):
    for inputs, expected in cases(oracles_dir, "sft_llada"):
        nll, masked = torch.tensor(inputs.nll), torch.tensor(inputs.masked)
        loss = loss_of(RandomMaskObjective(), nll, masked, after_prompts(inputs), inputs.p_mask, "sequence")
        assert loss == pytest.approx(expected, rel=1e-6)


def test_oracle_mdlm_loss(oracles_dir):
    """MDLM's weights are 1 / p for its linear schedule: LLaDA's, normalised in one of three ways."""
    for inputs, expected in cases(oracles_dir, "sft_mdlm"):
        nll, masked = torch.tensor(inputs.nll), torch.tensor(inputs.masked)
        maskable = torch.tensor(inputs.maskable)
        # The fixture masks tokens that it does not count as maskable; the loss sums all that are masked.
        weight = torch.tensor(inputs.weight)[:, None].expand_as(nll)
        rows, columns = masked.nonzero(as_tuple=True)
        loss = sft_loss(nll[rows, columns], weight[rows, columns], rows, maskable.sum(1), inputs.norm)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        p = [1 / w for w in inputs.weight]
        masked = masked & maskable
        ours = loss_of(RandomMaskObjective(), nll, masked, maskable, p, inputs.norm)
        rows, columns = masked.nonzero(as_tuple=True)
        plain = sft_loss(nll[rows, columns], weight[rows, columns], rows, maskable.sum(1), inputs.norm)
        assert ours == pytest.approx(plain.item(), rel=1e-6)


def test_oracle_d1_loss(oracles_dir):
    for inputs, expected in cases(oracles_dir, "sft_d1"):
        nll, masked = torch.tensor(inputs.nll), torch.tensor(inputs.masked)
        loss = loss_of(RandomMaskObjective(), nll, masked, after_prompts(inputs), inputs.t, "token")
        assert loss == pytest.approx(expected, rel=1e-6)


def test_oracle_dfactory_loss(oracles_dir):
    for inputs, expected in cases(oracles_dir, "sft_dfactory"):
        (nll, exists), (masked, _) = padded(inputs.nll), padded(inputs.masked)
        objective = RandomMaskObjective(weighting="none")
        loss = loss_of(objective, nll, masked, exists, [0.5] * len(nll), objective.loss_norm)
        assert loss == pytest.approx(expected, rel=1e-6)


def test_oracle_seed_full_loss(oracles_dir):
    for inputs, expected in cases(oracles_dir, "sft_seed_full"):
        nll, masked = torch.tensor(inputs.nll), torch.tensor(inputs.loss_mask)
        for norm in ("sequence", "token"):  # the same for rows of one length
            objective = RandomMaskObjective(weighting="mean")
            loss = loss_of(objective, nll, masked, torch.ones_like(masked), [0.5] * len(nll), norm)
            assert loss == pytest.approx(expected, rel=1e-6)


def test_oracle_random_masks(oracles_dir):
    for inputs, (expected, t) in cases(oracles_dir, "mask_seed_full_random"):
        uniform = torch.tensor(inputs.u_tok)
        options = {"eps": getattr(inputs, "lower", 0.1), "largest": getattr(inputs, "upper", 0.9)}
        objective = RandomMaskObjective(**options)
        rows = with_draws(objective, rows_of(torch.ones(1, len(uniform)) > 0), [inputs.u_t], uniform)
        (round_,) = objective.rounds(rows)
        assert round_.masked[0].tolist() == expected
        torch.testing.assert_close(round_.loss_weight[0], torch.full_like(uniform, 1 / t))


def test_oracle_cart_weights(oracles_dir):
    for inputs, expected in cases(oracles_dir, "cart_weights"):
        options = {"p": inputs.p} if hasattr(inputs, "p") else {}
        weight = cart_weights(~torch.tensor([inputs.masked]), **options)
        torch.testing.assert_close(weight[0], torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-8)


def test_cart_counts_the_prompt_and_not_the_padding():
    ids = torch.tensor([[11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 0, 0]])
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3], labels[1, :1] = -100, -100
    rows, _ = unpack_rows(ids, labels, mask, grid=FULL)
    objective = RandomMaskObjective(weighting="cart", eps=0.5, largest=0.6, cart_p=0.3)
    (round_,) = objective.rounds(with_draws(objective, rows, torch.zeros(2), [0, 1.0, 0, 0, 1.0, 0]))
    for row, hidden in ((0, [3, 5]), (1, [1, 3])):
        size, start = int(mask[row].sum()), int(rows.prompt_mask[row].sum())
        for i in hidden:
            expected = sum(0.5 * 0.3 * 0.7 ** (abs(i - j) - 1) for j in range(size) if j not in hidden)
            assert round_.loss_weight[row, i - start].item() == pytest.approx(expected, rel=1e-6)


def test_long_cart_weights_are_those_of_the_formula():
    known = torch.rand(2, 400, generator=torch.Generator().manual_seed(0)) < 0.3
    apart = (torch.arange(400)[:, None] - torch.arange(400)).abs()
    matrix = (0.5 * 0.1 * 0.9 ** (apart - 1.0)).fill_diagonal_(0)
    torch.testing.assert_close(cart_weights(known, 0.1), (known.float() @ matrix) * ~known, rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------- slices


def test_oracle_slices(oracles_dir):
    for inputs, expected in cases(oracles_dir, "semi_ar_slices"):
        pads = torch.tensor([getattr(inputs, "is_pad", [False] * inputs.length)])
        steps = torch.tensor([inputs.step_map]) if hasattr(inputs, "step_map") else None
        rows = rows_of(~pads | (pads.cumsum(1) <= getattr(inputs, "post_num", 0)), steps)
        slices = slices_of(rows, inputs.block_size)
        found = []
        for i, drawn in enumerate(inputs.bernoulli):
            round_ = slice_round(slices, torch.tensor([[i]]), torch.tensor([drawn]), rows.trained)
            if round_.scored.any():
                masked, scored = (x[0].nonzero().flatten().tolist() for x in (round_.masked, round_.scored))
                found.append({"masked": masked, "loss": scored})
        assert found == expected


def test_a_slice_is_scored_and_what_follows_is_hidden():
    objective = SemiAutoregressiveObjective(block_length=3, eps=0.5)
    scored = torch.ones(4, 8) > 0
    scored[3, 3:] = False  # the rest of the last row is no answer
    levels = torch.tensor([0.0, 0.0, 0.5, 0.999, 0.99, 0.0, 0.9, 0.0])
    counted = CountedDraws()
    assert objective.draw(rows_of(scored), counted) and counted.num_levels == 8
    uniform = torch.full((int(scored.sum()),), 0.9)
    uniform[1] = 0.1
    (round_,) = objective.rounds(with_draws(objective, rows_of(scored), levels, uniform))
    masked, found = ([x[i].nonzero().flatten().tolist() for i in range(4)] for x in (round_.masked, round_.scored))
    assert found[:2] == [[1], [3, 4, 5]] and masked[:2] == [[1, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7]]
    assert found[2] == masked[2] == [6, 7]  # none was drawn, equal numbers: all of the smallest
    assert found[3] == [0, 1, 2] and masked[3] == list(range(8))
    nll = torch.rand(4, 8)
    rows, columns = round_.scored.nonzero(as_tuple=True)
    loss = sft_loss(nll[rows, columns], round_.loss_weight[rows, columns], rows, scored.sum(1), "sequence")
    expected = sum(nll[i, found[i]].mean() for i in range(4)) / 4
    torch.testing.assert_close(loss, expected)


# ----------------------------------------------------------------------------------------------------- ar and trace


def test_autoregressive_scores_everything_once():
    scored = torch.tensor([[True, True, False], [True, False, False]])
    (round_,) = AutoregressiveObjective().rounds(rows_of(scored))
    assert torch.equal(round_.scored, scored) and round_.loss_weight is None
    assert AutoregressiveObjective().draw(rows_of(scored), CountedDraws()) == {}


def test_oracle_trace_rounds(oracles_dir):
    for inputs, expected in cases(oracles_dir, "trace_rounds_full"):
        pads = torch.tensor([getattr(inputs, "is_pad", [False] * len(inputs.step_map))])
        limit = getattr(inputs, "post_num", None)
        scored = ~pads | (pads.cumsum(1) <= (pads.size(1) if limit is None else limit))
        rows = rows_of(scored, step_map=torch.tensor([inputs.step_map]))
        rounds = TraceObjective(shrink=inputs.shrink).rounds(rows)
        found = [
            {"masked": r.masked[0].nonzero().flatten().tolist(), "loss": r.scored[0].nonzero().flatten().tolist()}
            for r in rounds
        ]
        assert found == expected
        if not pads.any():
            assert torch.equal(sum(r.scored.int() for r in rounds), scored.int())


# ---------------------------------------------------------------------------------------------------------- registry


def test_objectives_say_which_attention_they_are_for():
    assert {name: kind.attentions for name, kind in SFT_OBJECTIVES.items()} == {
        "ar": ("block", "full"),
        "block": ("block",),
        "random_mask": ("full",),
        "semi_ar": ("full",),
        "trace": ("block", "full"),
    }
    options = {"noise_per": "block", "eps": 0.1, "largest": 0.9, "weighting": "cart", "cart_p": 0.2, "shrink": 3}
    assert make_sft_objective(None, "block", **options) == BlockObjective("block", 0.1, 0.9)
    assert make_sft_objective(None, "full", **options) == RandomMaskObjective("cart", 0.1, 0.9, 0.2)
    assert make_sft_objective("trace", "full", **options) == TraceObjective(3)
    with pytest.raises(ValueError, match=r"`objective='block'` is for models with block.*\['ar', 'random_mask'"):
        make_sft_objective("block", "full", **options)
    with pytest.raises(ValueError, match=r"`objective='semi_ar'` is for.*full.*has block.*\['ar', 'block', 'trace'\]"):
        make_sft_objective("semi_ar", "block", block_length=4, **options)
    with pytest.raises(ValueError, match="needs `block_length`"):
        make_sft_objective("semi_ar", "full", block_length=None, **options)


# --------------------------------------------------------------------------------------------------------------- rows


def test_fill_to_a_length():
    ids = torch.tensor([[20, 21, EOS, 0, 0], [20, 21, 22, 23, EOS], [20, 21, 22, 23, 24]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [1] * 5])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    rows, _ = unpack_rows(ids, labels, mask, grid=FULL, fill_token_id=8, fill_to=7, eos_token_ids=torch.tensor([EOS]))
    found = [ids[exists == 1].tolist() for ids, exists in zip(rows.canvas_ids, rows.canvas_mask)]
    assert found == [[21, EOS, 8, 8, 8, 8], [21, 22, 23, EOS, 8, 8], [21, 22, 23, 24]]  # the last was cut
    assert rows.trained.sum(1).tolist() == [6, 6, 4]


def test_step_maps_become_rows():
    ids = torch.tensor([[11, 12, 13, 14, 15, 16, 17]])
    labels = torch.tensor([[-100, -100, -100, 14, 15, -100, 17]])
    steps = torch.tensor([[-1, -1, 5, 2, -1, 3, 0]])
    rows, _ = unpack_rows(ids, labels, torch.ones_like(ids), grid=FULL, step_map=steps)
    assert rows.canvas_ids.tolist() == [[13, 14, 15, 16, 17]]  # 13 was committed, so it is no prompt
    assert rows.step_map.tolist() == [[5, 2, -1, 3, 0]]
    assert rows.trained.tolist() == [[False, True, False, False, True]]
