"""Rounds of full-attention families and causal training, packed, against one plain forward per round."""

import pytest
import torch

from dllm_trl.modeling.plans import ChunkedPlan
from dllm_trl.objectives.trace import trace_rounds
from dllm_trl.scoring.layout import pack_causal
from dllm_trl.types import Grid, Round, Rows
from tests.scoring.packing import pack
from tests.trainers.tiny_rl import FULL, TINY, make_model


MASK = 2
FULL_GRID = Grid(None, "response")


def make_batch(seed=0):
    """Three rows with left-padded prompts; the second ends early, the third has a smaller limit of its own."""
    generator = torch.Generator().manual_seed(seed)
    prompt_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    canvas_mask = torch.ones(3, 8, dtype=torch.long)
    canvas_mask[2, 5:] = 0
    step_map = torch.stack([torch.randperm(8, generator=generator) for _ in range(3)])
    step_map[1, 4:] = -1
    step_map[2, 5:] = -1
    canvas_ids = torch.randint(6, 50, (3, 8), generator=generator)
    canvas_ids[1, 4:] = MASK  # never decoded: stayed masks
    canvas_ids[2, 5:] = 0
    prompt_ids = torch.randint(6, 50, (3, 5), generator=generator) * prompt_mask
    return prompt_ids, prompt_mask, canvas_ids, canvas_mask, step_map


def plain(model, batch, rounds):
    """`(B, R)` log-probabilities: one padded forward per round with the 2D mask."""
    prompt_ids, prompt_mask, canvas_ids, canvas_mask, _ = batch
    shift, total = model.config.logit_shift, torch.zeros(canvas_ids.shape)
    for one in rounds:
        noisy = torch.where(one.masked, MASK, canvas_ids)
        ids, mask = torch.cat([prompt_ids, noisy], 1), torch.cat([prompt_mask, canvas_mask], 1)
        # right padding inside a left-padded batch: rows one by one
        for row in range(len(ids)):
            real = mask[row].bool()
            logits = model(ids[row, real][None]).logits[0].log_softmax(-1)
            length = int(prompt_mask[row].sum())
            for column in one.scored[row].nonzero()[:, 0].tolist():
                total[row, column] = logits[length + column - shift, canvas_ids[row, column]]
    return total


def packed_logps(model, batch, rounds, **kwargs):
    packed = pack(
        *batch[:4], rounds, block_length=None, mask_token_id=MASK, logit_shift=model.config.logit_shift, **kwargs
    )
    return score(model, packed), packed


def score(model, packed):
    logits = model(
        packed.input_ids, position_ids=packed.position_ids, plan=packed.plan, score_index=packed.score_index
    ).logits[0]
    values = logits.log_softmax(-1).gather(-1, packed.labels[:, None])[:, 0]
    return packed.scatter(values).sum(0)


@pytest.fixture(scope="module", params=FULL)
def model(request):
    return make_model(request.param).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("shrink", [1, 4, 100])
def test_equals_a_forward_per_round(model, implementation, shrink, uncompiled):
    batch = make_batch()
    rounds = trace_rounds(batch[4], batch[4] >= 0, shrink=shrink)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = plain(model, batch, rounds)
        model.set_attn_implementation(implementation)
        for per_forward in (None, 1, 3):
            actual, _ = packed_logps(model, batch, rounds, rounds_per_forward=per_forward)
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    model.set_attn_implementation("sdpa")


def gradients(model, batch, rounds, **kwargs):
    model.zero_grad()
    logps, _ = packed_logps(model, batch, rounds, **kwargs)
    (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
    return logps.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("distributed", [False, True])
def test_chunks_change_nothing(model, distributed, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: distributed)  # the other kind of recomputation
    batch = make_batch()
    rounds = trace_rounds(batch[4], batch[4] >= 0)
    model.train()
    logps, expected = gradients(model, batch, rounds)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for count in (1, 2):
            again, actual = gradients(model, batch, rounds, rounds_per_forward=count)
            torch.testing.assert_close(again, logps, atol=1e-5, rtol=0)
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    model.gradient_checkpointing_disable()
    model.eval()


def test_chunks_keep_nothing_but_their_input(model):
    """What autograd saves outside of the recomputed parts does not grow with the rounds."""
    batch = make_batch()
    sizes = []
    for steps in (2, 4, 8):
        rounds = trace_rounds(batch[4] * steps // 8, batch[4] >= 0)
        saved = 0

        def pack(tensor):
            nonlocal saved
            saved += tensor.numel() if tensor.is_floating_point() and tensor.requires_grad else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            packed_logps(model, batch, rounds, rounds_per_forward=1)
        sizes.append(saved)
    assert sizes[1] <= 1.05 * sizes[0] and sizes[2] <= 1.05 * sizes[0]


def test_padded_chunks(model):
    batch = make_batch()
    rounds = trace_rounds(batch[4], batch[4] >= 0)
    expected, packed = packed_logps(model, batch, rounds, rounds_per_forward=2)
    assert isinstance(packed.plan, ChunkedPlan) and len(packed.plan.plans) == 3  # 8 + 4 + 5 rounds, 6 at a time
    padded = packed.pad_chunks(5)
    assert len(padded.plan.plans) == 5 and packed.pad_chunks(2) is packed
    torch.testing.assert_close(score(model, padded), expected, atol=1e-6, rtol=0)


def test_rows_without_scored_tokens_cost_nothing(model):
    batch = make_batch()
    scored = batch[4] >= 0
    scored[0] = False
    rounds = trace_rounds(batch[4], scored)
    actual, packed = packed_logps(model, batch, rounds)
    assert packed.input_ids.size(1) == 4 * 13 + 5 * 6
    torch.testing.assert_close(actual, plain(model, batch, rounds), atol=1e-5, rtol=0)
    nothing, packed = packed_logps(model, batch, trace_rounds(batch[4], torch.zeros_like(scored)))
    assert packed.input_ids.numel() == 1 and (nothing == 0).all()


def test_first_token_needs_a_prompt():
    masked = torch.ones(1, 3, dtype=torch.bool)
    empty, ids = torch.zeros(1, 0, dtype=torch.long), torch.full((1, 3), 7)
    with pytest.raises(ValueError, match="give the row a prompt"):
        pack(
            empty, empty, ids, torch.ones_like(ids), [Round(masked, masked)],
            block_length=None, mask_token_id=MASK, logit_shift=1,
        )  # fmt: skip
    with pytest.raises(ValueError, match="give the row a prompt"):
        pack_causal(Rows(empty, empty, ids, torch.ones_like(ids), FULL_GRID), Round(masked, masked))
    with pytest.raises(ValueError, match="`rounds_per_forward` must be at least 1"):
        pack(empty, empty, ids, ids, [], block_length=None, mask_token_id=MASK, rounds_per_forward=0)


@pytest.mark.parametrize("family", TINY)
def test_causal_is_the_stock_causal_model(family):
    model = make_model(family).eval()
    prompt_ids, prompt_mask, canvas_ids, canvas_mask, step_map = make_batch()
    scored = step_map >= 0
    with torch.no_grad():
        actual = score(
            model,
            pack_causal(Rows(prompt_ids, prompt_mask, canvas_ids, canvas_mask, FULL_GRID), Round(scored, scored)),
        )
        expected = torch.zeros_like(actual)
        for row in range(3):
            ids = torch.cat([prompt_ids[row][prompt_mask[row].bool()], canvas_ids[row][canvas_mask[row].bool()]])
            causal = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool).tril()
            logps = model(ids[None], causal).logits[0].log_softmax(-1)
            length = int(prompt_mask[row].sum())
            for column in scored[row].nonzero()[:, 0].tolist():
                expected[row, column] = logps[length + column - 1, canvas_ids[row, column]]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
