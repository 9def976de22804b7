"""Block diffusion SFT: corruption, weights and loss against the published numbers."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dllm_trl  # noqa: F401  (registers the families)
from dllm_trl.objectives import SFT_OBJECTIVES, make_sft_objective
from dllm_trl.objectives.block_mask import BlockObjective, mask_probability
from dllm_trl.scoring import Scorer
from dllm_trl.trainers.documents import unpack_rows
from dllm_trl.trainers.draws import CountedDraws, PooledDraws, draw_levels
from dllm_trl.trainers.sft_loss import num_loss_items, sft_loss
from dllm_trl.types import Grid, Round


EOS = 9
GRID, FULL = Grid(4), Grid(None, "response")


def cases(oracles_dir, name):
    found = json.loads((oracles_dir / f"{name}.json").read_text())["cases"]
    assert found
    return [(SimpleNamespace(**case["inputs"]), case["expected"]) for case in found]


def padded(rows):
    """Lists of several lengths as one matrix, filled up with zeros, and which of it they fill."""
    tensors = [torch.tensor(row) for row in rows]
    exists = torch.nn.utils.rnn.pad_sequence([torch.ones(len(t), dtype=torch.bool) for t in tensors], True)
    return torch.nn.utils.rnn.pad_sequence(tensors, True), exists


def loss_of(nll, masked, weight, num_trained, loss_norm):
    """`sft_loss` of matrices `(B, R)`."""
    rows, columns = masked.nonzero(as_tuple=True)
    return sft_loss(nll[rows, columns], weight[rows, columns], rows, num_trained, loss_norm)


# ------------------------------------------------------------------------------------------------------------ fixtures


def test_oracle_noise_levels(oracles_dir):
    for inputs, expected in cases(oracles_dir, "mask_bd3lm_block_t"):
        u = torch.tensor(inputs.u, dtype=torch.float64)
        flat = u.flatten()
        # The public code gives stratum i to block i; the trainer shuffles the strata.
        strata = torch.arange(len(flat)) / len(flat)
        levels = flat / len(flat) + strata if getattr(inputs, "antithetic", True) else flat
        torch.testing.assert_close(
            mask_probability(levels).view_as(u), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0
        )


def test_oracle_bd3lm_loss(oracles_dir):
    for inputs, expected in cases(oracles_dir, "sft_bd3lm"):
        nll, masked, t = torch.tensor(inputs.nll), torch.tensor(inputs.masked), torch.tensor(inputs.t)
        loss = loss_of(nll, masked, 1 / t, torch.full((len(nll),), nll.size(1)), "token")
        assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_oracle_sdar_loss(oracles_dir):
    for inputs, expected in cases(oracles_dir, "sft_sdar"):
        (nll, exists), (masked, _), t = padded(inputs.nll), padded(inputs.masked), torch.tensor(inputs.t)
        weight = (1 / t)[:, None].expand_as(nll)  # one noise level per sequence
        loss = loss_of(nll, masked, weight, exists.sum(1), "token")
        assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_oracle_seed_block_loss(oracles_dir):
    for inputs, expected in cases(oracles_dir, "sft_seed_block"):
        nll, masked = torch.tensor(inputs.nll), torch.tensor(inputs.loss_mask)
        loss = loss_of(nll, masked, torch.ones_like(nll), masked.sum(1), "batch")
        # The public trainer also divides by the padded length of the response.
        assert (loss / inputs.response_len).item() == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def golden(golden_dir):
    return load_file(golden_dir / "sdar" / "golden_train.safetensors")


@pytest.fixture(scope="module")
def golden_rows(golden):
    """The published packed batch as our rows, with the published draws in the order we take them."""
    rows, source = unpack_rows(golden["input_ids"], golden["labels"], position_ids=golden["position_ids"], grid=GRID)
    uniform = torch.cat([golden["row0.u"], golden["row1.u"]]).flatten()[source[rows.trained]]
    # The public code draws a level for the tail of pads too, which has nothing to train.
    levels = torch.cat([golden["row0.t"], golden["row1.t"]])[: int(rows.trained.any(1).sum())]
    return with_draws(BlockObjective(noise_per="sequence"), rows, levels, uniform), source


def test_golden_corruption(golden, golden_rows):
    rows, source = golden_rows
    (round_,) = BlockObjective(noise_per="sequence").rounds(rows)
    masked = torch.zeros(golden["input_ids"].numel(), dtype=torch.bool)
    masked[source[round_.masked]] = True
    assert torch.equal(masked.view_as(golden["input_ids"]), golden["masked_indices"].bool())
    assert torch.equal(round_.masked, round_.scored)
    order = source[round_.scored].argsort()
    torch.testing.assert_close(1 / round_.loss_weight[round_.scored][order], golden["p_mask"])


def test_golden_loss_and_gradients(golden, golden_rows, golden_dir):
    model = AutoModelForCausalLM.from_pretrained(golden_dir / "sdar", dtype=torch.float32)
    rows, source = golden_rows
    (round_,) = BlockObjective(noise_per="sequence").rounds(rows)
    scorer = Scorer(mask_token_id=126)
    packed = scorer.pack(rows, [round_])
    logits = model(**packed.model_inputs()).logits[0]
    # Upstream forwards 128 tokens, [noisy | clean] of everything
    assert packed.input_ids.numel() < 80
    order = source[packed.index[1:]].argsort()
    torch.testing.assert_close(logits[order], golden["masked_logits"], atol=1e-4, rtol=0)
    nll = -scorer(model, rows, [round_]).logps
    torch.testing.assert_close(nll[order], golden["per_token_loss"] * golden["p_mask"], atol=1e-4, rtol=1e-4)
    loss = sft_loss(nll, round_.loss_weight[packed.index[1:]], packed.index[1], rows.trained.sum(1))
    torch.testing.assert_close(loss, golden["loss"][0], rtol=1e-5, atol=0)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    named = [name for name in golden if name.startswith("grad.")]
    assert named
    for name in named:
        expected = golden[name]
        assert (gradients[name.removeprefix("grad.")] - expected).norm() / expected.norm() < 1e-4, name
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    torch.testing.assert_close(total, golden["grad_norm"][0], rtol=1e-4, atol=0)


# ----------------------------------------------------------------------------------------------------------- objective


def with_draws(objective, rows, levels, uniform):
    """The rows with what the objective draws, of these numbers in the order of the rows."""
    draws = objective.draw(rows, PooledDraws(torch.as_tensor(levels), torch.as_tensor(uniform)))
    return dataclasses.replace(rows, draws=draws)


def drawn(objective, rows, seed=0):
    counted, generator = CountedDraws(), torch.Generator().manual_seed(seed)
    objective.draw(rows, counted)
    levels = draw_levels(counted.num_levels, generator, antithetic=True)
    uniform = torch.rand(counted.num_uniform, generator=generator)
    return with_draws(objective, rows, levels, uniform), levels, uniform


def levels_per_row(objective, rows):
    counts = []
    for i in range(len(rows)):
        objective.draw(rows[i : i + 1], counted := CountedDraws())
        counts.append(counted.num_levels)
    return counts


def test_levels_are_per_block_or_per_sequence():
    ids = torch.arange(10, 34).view(2, 12)
    labels = ids.clone()
    labels[0, :6] = -100
    labels[1, :3] = -100
    rows, _ = unpack_rows(ids, labels, torch.ones_like(ids), grid=GRID)
    assert levels_per_row(BlockObjective(), rows) == [2, 3]
    assert levels_per_row(BlockObjective(noise_per="sequence"), rows) == [1, 1]
    rows, levels, uniform = drawn(BlockObjective(), rows)
    (round_,) = BlockObjective().rounds(rows)
    p = mask_probability(levels)
    # Row 0 is trained from position 6 on: 2 tokens of block 1, then block 2.
    expected = torch.cat(
        [p[:2].repeat_interleave(torch.tensor([2, 4])), p[2:].repeat_interleave(torch.tensor([1, 4, 4]))]
    )
    torch.testing.assert_close(1 / round_.loss_weight[rows.trained], expected)
    assert torch.equal(round_.masked[rows.trained], uniform < expected)


def test_antithetic_levels_cover_the_range():
    levels = draw_levels(64, torch.Generator().manual_seed(0), antithetic=True)
    assert torch.equal((levels * 64).long().sort().values, torch.arange(64))


def test_mean_masked_share_is_the_level():
    ids = torch.randint(1, 90, (64, 65))
    labels = ids.clone()
    labels[:, 0] = -100
    objective = BlockObjective(noise_per="sequence")
    rows, levels, _ = drawn(objective, unpack_rows(ids, labels, torch.ones_like(ids), grid=Grid(8))[0])
    (round_,) = objective.rounds(rows)
    share = round_.masked.sum(1) / rows.trained.sum(1)
    torch.testing.assert_close(share, mask_probability(levels), atol=0.2, rtol=0)
    assert abs(share.mean() - 0.5) < 0.02


def test_what_follows_an_answer_in_its_block_is_hidden():
    ids = torch.arange(10, 26)[None]
    labels = torch.full_like(ids, -100)
    labels[0, 2:6] = ids[0, 2:6]  # an answer in blocks 0 and 1; positions 6 and 7 are the next turn's
    labels[0, 13:15] = ids[0, 13:15]
    rows, _ = unpack_rows(ids, labels, torch.ones_like(ids), grid=GRID)
    (round_,) = BlockObjective().rounds(with_draws(BlockObjective(), rows, torch.full((3,), 0.5), torch.zeros(6)))
    start = rows.prompt_mask.sum().item()
    assert (round_.scored[0].nonzero().flatten() + start).tolist() == [2, 3, 4, 5, 13, 14]
    assert (round_.masked[0].nonzero().flatten() + start).tolist() == [2, 3, 4, 5, 6, 7, 13, 14, 15]


def test_names_and_callables():
    assert make_sft_objective("block", noise_per="sequence") == BlockObjective(noise_per="sequence")

    def everything(rows):
        return [Round(rows.trained, rows.trained)]

    assert make_sft_objective(everything, noise_per="block").function is everything
    with pytest.raises(ValueError, match=r"one of \['ar', 'block'.*but is 'causal'"):
        make_sft_objective("causal")
    assert set(SFT_OBJECTIVES) >= {"block"}


# ---------------------------------------------------------------------------------------------------------------- rows


def documents(rows):
    """Each row as (prompt, canvas, trained part of the canvas)."""
    found = []
    for i in range(len(rows)):
        prompt, canvas = rows.prompt_ids[i][rows.prompt_mask[i] == 1], rows.canvas_ids[i]
        found.append((prompt.tolist(), canvas[rows.canvas_mask[i] == 1].tolist(), canvas[rows.trained[i]].tolist()))
    return found


def test_padded_rows():
    ids = torch.tensor([[1, 2, 3, 4, 5, 0], [11, 12, 13, 14, 15, 16], [0, 0, 21, 22, 23, 24]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6, [0, 0, 1, 1, 1, 1]])
    labels = torch.where(mask == 1, ids, -100)
    labels[0, :2] = -100
    labels[1] = -100
    rows, source = unpack_rows(ids, labels, mask, grid=FULL)
    assert documents(rows) == [
        ([1, 2], [3, 4, 5], [3, 4, 5]),
        ([11, 12, 13, 14, 15, 16], [], []),
        ([21], [22, 23, 24], [22, 23, 24]),  # the first token is never trained
    ]
    flat = ids.flatten()
    assert torch.equal(flat[source[rows.trained]], rows.canvas_ids[rows.trained])


def test_packed_documents_become_rows():
    ids = torch.tensor([[1, 2, 3, 4, 11, 12, 13, 21, 22]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    labels = ids.masked_fill(positions == 0, -100)
    labels[0, 5] = -100
    rows, _ = unpack_rows(ids, labels, position_ids=positions, grid=FULL)
    assert documents(rows) == [([1], [2, 3, 4], [2, 3, 4]), ([11, 12], [13], [13]), ([21], [22], [22])]


@pytest.mark.parametrize(
    ("length", "ends_in", "filled"),
    [(5, 4, 3), (8, 7, 0), (7, 5, 1), (6, 3, 0)],
    ids=["last token", "full block", "inside the last block", "an earlier block"],
)
def test_eos_fills_the_block_it_ends(length, ends_in, filled):
    ids = torch.arange(20, 20 + length)[None]
    ids[0, ends_in] = EOS
    labels = ids.clone()
    labels[0, :2] = -100
    rows, source = unpack_rows(
        ids, labels, torch.ones_like(ids), grid=GRID, fill_token_id=8, eos_token_ids=torch.tensor([7, EOS])
    )
    ((prompt, canvas, trained),) = documents(rows)
    assert canvas == ids[0, 2:].tolist() + [8] * filled == trained
    assert (source[rows.canvas_mask == 1] == -1).sum() == filled


def test_a_cut_or_untrained_end_is_not_filled():
    ids = torch.tensor([[20, 21, 22, 23, 24], [20, 21, 22, 23, EOS]])
    labels = ids.clone()
    labels[:, 0] = -100
    labels[1, 3:] = -100
    rows, source = unpack_rows(
        ids, labels, torch.ones_like(ids), grid=GRID, fill_token_id=8, eos_token_ids=torch.tensor([EOS])
    )
    assert (rows.canvas_ids != 8).all() and rows.canvas_mask.sum() == 8


def test_labels_must_be_the_tokens():
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="`labels` must be `input_ids` or -100"):
        unpack_rows(ids, torch.tensor([[2, 3, -100]]), torch.ones_like(ids), grid=FULL)


# ---------------------------------------------------------------------------------------------------------------- loss


def test_loss_norms():
    nll, weight, row = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0, 0, 2])
    num_trained = torch.tensor([4, 0, 2])
    assert sft_loss(nll, weight, row, num_trained, "masked").item() == pytest.approx(8 / 3)
    assert sft_loss(nll, weight, row, num_trained, "token").item() == pytest.approx(8 / 6)
    assert sft_loss(nll, weight, row, num_trained, "sequence").item() == pytest.approx((5 / 4 + 3 / 2) / 2)
    assert sft_loss(nll, weight, row, num_trained, "batch").item() == pytest.approx(8 / 2)
    assert sft_loss(nll, weight, row, num_trained, "token", num_items=16).item() == pytest.approx(8 / 16)
    assert [num_loss_items(num_trained, norm, 3).item() for norm in ("token", "batch", "masked")] == [6, 2, 3]


def test_nothing_to_train_is_a_loss_of_zero():
    none = torch.zeros(0)
    assert sft_loss(none, none, none.long(), torch.zeros(2, dtype=torch.long)).item() == 0
