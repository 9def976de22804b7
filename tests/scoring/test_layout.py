"""The packed layout against a plain statement of who sees whom, and against one dense row per round."""

import json
import os
from pathlib import Path

import pytest
import torch

from dllm_trl.types import Round
from tests.scoring.packing import pack
from tests.trainers.tiny_rl import BLOCK, make_model


ORACLES = Path(os.environ.get("DLLM_TRL_ORACLES", Path(__file__).parents[1] / "fixtures" / "oracles"))
MASK = 99
PROMPTS = [
    [11, 12, 13, 14, 15, 16, 17],
    [21, 22],
    [11, 12, 13, 14, 15, 16, 17],
    [31, 32, 33, 34],
    [11, 12, 13, 14, 15, 16, 17],
]
LENGTHS = [9, 5, 12, 1, 6]


def cases(name):
    return [pytest.param(c, id=c["name"]) for c in json.loads((ORACLES / f"{name}.json").read_text())["cases"]]


def left_pad(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], dtype=torch.long).view(len(prompts), width)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], dtype=torch.long).view(ids.shape)
    return ids, mask


def make_batch(block_length, num_steps=3, prompts=PROMPTS, lengths=LENGTHS, seed=0, vocab=98):
    """Ragged prompts and responses, with random steps in every block: round r masks step >= r and scores step == r."""
    generator = torch.Generator().manual_seed(seed)
    prompt_ids, prompt_mask = left_pad(prompts)
    width = max(lengths)
    canvas_mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    canvas_ids = torch.randint(1, vocab, canvas_mask.shape, generator=generator) * canvas_mask
    step = torch.randint(0, min(num_steps, block_length), canvas_mask.shape, generator=generator)
    step[canvas_mask == 0] = -1
    rounds = [Round(masked=step >= r, scored=step == r) for r in range(min(num_steps, block_length))]
    return prompt_ids, prompt_mask, canvas_ids, canvas_mask, rounds


def describe(packed, block_length):
    """Each packed token as (row or None, clean, position, token, copy), read back from the layout."""
    plan = packed.plan
    columns = zip(
        plan.row.tolist(), plan.clean.tolist(), packed.position_ids[0].tolist(), packed.input_ids[0].tolist(),
        plan.copy.tolist(), plan.group.tolist(), strict=True,
    )  # fmt: skip
    return list(columns)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("block_length", [1, 3, 4, 8])
def test_visibility_against_brute_force(block_length, share_prompts):
    batch = make_batch(block_length)
    packed = pack(*batch, block_length=block_length, mask_token_id=MASK, share_prompts=share_prompts)
    tokens = describe(packed, block_length)
    dense = packed.plan.dense()[0, 0]
    assert dense.shape == (len(tokens), len(tokens))
    for i, (q_row, q_clean, q_pos, _, q_copy, q_group) in enumerate(tokens):
        for j, (k_row, k_clean, k_pos, _, k_copy, k_group) in enumerate(tokens):
            q_block, k_block = q_pos // block_length, k_pos // block_length
            if q_group != k_group or k_row not in (-1, q_row):
                expected = False
            elif not k_clean:
                expected = not q_clean and q_copy == k_copy
            else:
                expected = k_block < q_block or (q_clean and k_block == q_block)
            assert dense[i, j].item() == expected, (i, j)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("block_length", [1, 3, 4, 8])
@pytest.mark.parametrize("segment", [1, 6, 1000])
def test_segments_say_what_dense_says(block_length, share_prompts, segment, monkeypatch):
    monkeypatch.setattr("dllm_trl.scoring.layout.CLEAN_SEGMENT", segment)
    monkeypatch.setattr("dllm_trl.scoring.layout.NOISY_SEGMENT", segment)
    batch = make_batch(block_length)
    plan = pack(*batch, block_length=block_length, mask_token_id=MASK, share_prompts=share_prompts).plan
    ends = torch.tensor(plan.sizes).cumsum(0).tolist()
    spans = [slice(end - size, end) for end, size in zip(ends, plan.sizes, strict=True)]
    built = torch.zeros(ends[-1], ends[-1], dtype=torch.bool)
    for span, keys, mask in zip(spans, plan.keys, plan.masks, strict=True):
        assert len(set(keys)) == len(keys)
        columns = torch.cat([torch.arange(spans[k].start, spans[k].stop) for k in keys])
        assert mask is None or (mask.shape == (1, 1, span.stop - span.start, len(columns)) and not mask.all())
        built[span.start : span.stop, columns] = True if mask is None else mask[0, 0]
    assert torch.equal(built, plan.dense()[0, 0])
    assert built.any(1).all()


def test_block_mask_says_what_dense_says():
    batch = make_batch(4)
    plan = pack(*batch, block_length=4, mask_token_id=MASK).plan
    mask_mod = plan.block_mask("cpu").mask_mod
    length = sum(plan.sizes)
    built = mask_mod(0, 0, torch.arange(length)[:, None], torch.arange(length)[None, :])
    assert torch.equal(built, plan.dense()[0, 0])


@pytest.mark.parametrize("block_length", [1, 3, 4, 8])
def test_layout(block_length):
    prompt_ids, prompt_mask, canvas_ids, canvas_mask, rounds = make_batch(block_length)
    packed = pack(
        prompt_ids, prompt_mask, canvas_ids, canvas_mask, rounds, block_length=block_length, mask_token_id=MASK
    )
    tokens = describe(packed, block_length)
    assert len(tokens) == sum(packed.plan.sizes)

    shared = [(g, p, t) for row, clean, p, t, _, g in tokens if row == -1]
    # Rows 0, 2 and 4 have the same prompt: its full blocks are there once.
    expected = 7 // block_length * block_length + 2 // block_length * block_length + 4 // block_length * block_length
    assert len(shared) == len(set(shared)) == expected

    for row, length in enumerate(LENGTHS):
        full = PROMPTS[row] + canvas_ids[row, :length].tolist()
        mine = [t for t in tokens if t[0] == row]
        first = len(PROMPTS[row]) // block_length * block_length
        last = (len(full) - 1) // block_length * block_length
        assert [(p, t) for _, clean, p, t, _, _ in mine if clean] == list(enumerate(full))[first:last]
        # Noisy: one copy per (block, round) that scores something, in the order of the blocks.
        copies, expected = [], []
        for copy in sorted({c for _, clean, _, _, c, _ in mine if not clean}):
            copies.append([(p, t) for _, _, p, t, c, _ in mine if c == copy])
        for start in range(first, len(full), block_length):
            span = range(start, min(start + block_length, len(full)))
            for r in rounds:
                inside = [p for p in span if p >= len(PROMPTS[row])]
                if any(r.scored[row, p - len(PROMPTS[row])] for p in inside):
                    hidden = {p for p in inside if r.masked[row, p - len(PROMPTS[row])]}
                    expected.append([(p, MASK if p in hidden else full[p]) for p in span])
        assert copies == expected


def test_scored_tokens_come_back_once():
    prompt_ids, prompt_mask, canvas_ids, canvas_mask, rounds = make_batch(4)
    packed = pack(prompt_ids, prompt_mask, canvas_ids, canvas_mask, rounds, block_length=4, mask_token_id=MASK)
    assert len(packed.labels) == canvas_mask.sum()
    scored = torch.stack([r.scored for r in rounds])
    assert torch.equal(packed.scatter(torch.ones(len(packed.labels))) == 1, scored)
    assert torch.equal(packed.scatter(packed.labels), canvas_ids * scored)
    assert (packed.input_ids[0, packed.score_index] == MASK).all()


def test_scatter_is_differentiable():
    packed = pack(*make_batch(4), block_length=4, mask_token_id=MASK)
    values = torch.arange(float(len(packed.labels)), requires_grad=True)
    (packed.scatter(values) ** 2).sum().backward()
    torch.testing.assert_close(values.grad, 2 * values.detach())


@pytest.mark.parametrize("block_length", [1, 3, 4, 8])
def test_logit_shift_reads_one_token_earlier(block_length):
    batch = make_batch(block_length)
    packed = pack(*batch, block_length=block_length, mask_token_id=MASK, logit_shift=1)
    tokens = describe(packed, block_length)
    lengths = [len(p) for p in PROMPTS]
    _, rows, columns = packed.index
    for read, row, column in zip(packed.score_index.tolist(), rows.tolist(), columns.tolist(), strict=True):
        position = lengths[row] + column
        seen_row, clean, seen, token, _, _ = tokens[read]
        assert seen == position - 1 and seen_row in (-1, row)
        # The block's first token is read from the clean block before, the others from their own copy.
        assert clean == (position % block_length == 0)
        if clean:
            assert token == (PROMPTS[row] + batch[2][row].tolist())[seen]


def test_logit_shift_refuses_the_first_token():
    ids, mask = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)
    everything = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="first token"):
        pack(
            ids, mask, torch.ones(1, 4, dtype=torch.long), everything, [Round(everything, everything)],
            block_length=4, mask_token_id=MASK, logit_shift=1,
        )  # fmt: skip


def test_clean_blocks_after_the_last_scored_one_are_dropped():
    ids, mask = left_pad([[1, 2, 3, 4, 5]])
    canvas = torch.arange(10, 30)[None]
    scored = torch.zeros(1, 20, dtype=torch.bool)
    scored[0, 4] = True  # position 9, block 2
    packed = pack(
        ids, mask, canvas, torch.ones_like(canvas), [Round(scored, scored)], block_length=4, mask_token_id=MASK
    )
    assert packed.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert packed.input_ids[0].tolist() == [1, 2, 3, 4, 5, 10, 11, 12, 13, MASK, 15, 16]


def test_rows_without_a_scored_token_are_left_out():
    prompt_ids, prompt_mask, canvas_ids, canvas_mask, rounds = make_batch(4)
    for r in rounds:
        r.scored[1] = False
    packed = pack(prompt_ids, prompt_mask, canvas_ids, canvas_mask, rounds, block_length=4, mask_token_id=MASK)
    assert 1 not in packed.plan.row.tolist()
    assert not packed.scatter(torch.ones(len(packed.labels)))[:, 1].any()


def test_nothing_scored_still_gives_a_forward():
    prompt_ids, prompt_mask, canvas_ids, canvas_mask, rounds = make_batch(4)
    nothing = [Round(r.masked, torch.zeros_like(r.scored)) for r in rounds]
    for given in (nothing, []):
        packed = pack(prompt_ids, prompt_mask, canvas_ids, canvas_mask, given, block_length=4, mask_token_id=MASK)
        assert packed.input_ids.shape == (1, 1) and len(packed.labels) == 0
        assert packed.plan.dense().all() and packed.plan.masks == [None]
        assert packed.scatter(torch.zeros(0)).shape == (len(given), *canvas_ids.shape)


def test_bad_input():
    prompt_ids, prompt_mask, canvas_ids, canvas_mask, rounds = make_batch(4)
    with pytest.raises(ValueError, match="`block_length` must be at least 1"):
        pack(prompt_ids, prompt_mask, canvas_ids, canvas_mask, rounds, block_length=0, mask_token_id=MASK)
    everywhere = torch.ones_like(rounds[0].scored)
    with pytest.raises(ValueError, match="`canvas_mask`"):
        pack(
            prompt_ids, prompt_mask, canvas_ids, canvas_mask, [Round(everywhere, everywhere)],
            block_length=4, mask_token_id=MASK,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- oracle fixtures


def fully_masked(prompt, length, block_length):
    """One round over the whole response, and each packed token as a column of [prompt | clean | noisy]."""
    prompt_ids, prompt_mask = left_pad([prompt])
    canvas = torch.arange(50, 50 + length)[None]
    everything = torch.ones(1, length, dtype=torch.bool)
    packed = pack(
        prompt_ids, prompt_mask, canvas, everything, [Round(everything, everything)],
        block_length=block_length, mask_token_id=MASK,
    )  # fmt: skip
    return packed, describe(packed, block_length)


@pytest.mark.parametrize("case", cases("block_attention_visible_keys"))
def test_oracle_visible_keys(case):
    inputs, expected = case["inputs"], case["expected"]
    block_length, response = inputs["block_size"], inputs["L1"]
    pads = sum(inputs.get("prompt_is_pad", []))
    prompt = list(range(1, inputs["L0"] - pads + 1))
    if len(prompt) % block_length:
        # The fixture anchors the grid at the response start; ours is anchored at token 0. They agree when the response
        # starts a block, so such a prompt is taken without its remainder and the columns are renumbered.
        drop = len(prompt) % block_length
        gone = set(range(pads, pads + drop))
        keep = [c for c in range(inputs["L0"] + 2 * response) if c not in gone]
        expected = [[keep.index(k) for k in expected[c] if k not in gone] for c in keep]
        prompt = prompt[drop:]
    start = pads + len(prompt)  # first column of the clean response
    packed, tokens = fully_masked(prompt, response, block_length)
    dense = packed.plan.dense()[0, 0]
    columns = [pads + p if clean else start + response + p - len(prompt) for _, clean, p, _, _, _ in tokens]
    for i, (_, clean, p, _, _, _) in enumerate(tokens):
        seen = sorted(columns[j] for j in dense[i].nonzero().flatten().tolist())
        want = expected[columns[i]]
        if clean and p < len(prompt):
            # The fixture's prompt sees itself whole; ours is block-causal there too.
            want = [k for k in want if (k - pads) // block_length <= p // block_length]
        assert seen == want


@pytest.mark.parametrize("case", cases("block_position_ids"))
def test_oracle_position_ids(case):
    pads, response = case["inputs"]["prompt_is_pad"], case["inputs"]["L1"]
    length = pads.count(False)
    _, tokens = fully_masked(list(range(1, length + 1)), response, block_length=1)
    expected = [p for p, pad in zip(case["expected"], pads + [False] * 2 * response, strict=True) if not pad]
    got = [p for _, _, p, _, _, _ in tokens]
    # The last clean block (here one token) is never read and dropped.
    assert got == expected[: length + response - 1] + expected[length + response :]


@pytest.mark.parametrize("case", cases("bd3lm_visible_keys"))
def test_oracle_bd3lm_visible_keys(case):
    length, block_length = case["inputs"]["n"], case["inputs"]["block_size"]
    packed, tokens = fully_masked([], length, block_length)
    columns = [p + length * clean for _, clean, p, _, _, _ in tokens]  # fixture: [x_t | x_0]
    dense = packed.plan.dense()[0, 0]
    for i in range(len(tokens)):
        seen = sorted(columns[j] for j in dense[i].nonzero().flatten().tolist())
        assert seen == [k for k in case["expected"][columns[i]] if k in columns]


# ------------------------------------------------------------------------------------------- against one row per round


def tiny_model(family="sdar", attn_implementation="sdpa"):
    model = make_model(family, vocab_size=100, mask_token_id=MASK).eval()
    model.set_attn_implementation(attn_implementation)
    return model


def row_per_round(model, batch, block_length):
    """The plain reference: for each row and round one dense forward over [clean | noisy], full logits."""
    prompt_ids, prompt_mask, canvas_ids, canvas_mask, rounds = batch
    logps = torch.zeros(len(rounds), *canvas_ids.shape)
    for r, one in enumerate(rounds):
        for b in range(canvas_ids.size(0)):
            prompt = prompt_ids[b][prompt_mask[b] == 1]
            columns = canvas_mask[b].nonzero().flatten()
            clean = torch.cat([prompt, canvas_ids[b, columns]])
            noisy = clean.clone()
            noisy[len(prompt) :][one.masked[b, columns]] = MASK
            n = len(clean)
            blocks = torch.arange(n) // block_length
            before, same = blocks[:, None] > blocks[None], blocks[:, None] == blocks[None]
            nothing = torch.zeros(n, n, dtype=torch.bool)
            mask = torch.cat([torch.cat([before | same, nothing], 1), torch.cat([before, same], 1)])
            logits = model(
                input_ids=torch.cat([clean, noisy])[None],
                position_ids=torch.arange(n).repeat(2)[None],
                attention_mask=mask[None, None],
            ).logits[0]
            read = torch.arange(n) + n
            if model.config.logit_shift:
                starts = torch.arange(n) % block_length == 0
                read = torch.where(starts, torch.arange(n) - 1, read - 1)
            logp = logits[read].log_softmax(-1).gather(1, clean[:, None])[len(prompt) :, 0]
            logps[r, b, columns] = logp * one.scored[b, columns]
    return logps


def packed_logps(model, batch, block_length, **kwargs):
    kwargs |= {"mask_token_id": MASK, "logit_shift": model.config.logit_shift}
    packed = pack(*batch, block_length=block_length, **kwargs)
    logits = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        plan=packed.plan,
        score_index=packed.score_index,
    ).logits
    assert logits.shape[:2] == (1, len(packed.labels))  # the head saw scored tokens only
    return packed.scatter(logits[0].log_softmax(-1).gather(1, packed.labels[:, None])[:, 0])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        difference = (got[name] - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-4, (name, difference)


@pytest.mark.parametrize("family", BLOCK)
@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("block_length", [1, 3, 4, 8])
def test_packed_equals_row_per_round(family, share_prompts, block_length, monkeypatch):
    monkeypatch.setattr("dllm_trl.scoring.layout.CLEAN_SEGMENT", 6)
    monkeypatch.setattr("dllm_trl.scoring.layout.NOISY_SEGMENT", 10)
    model, batch = tiny_model(family), make_batch(block_length)
    weight = torch.randn(batch[2].shape, generator=torch.Generator().manual_seed(1))
    expected = row_per_round(model, batch, block_length)
    got = packed_logps(model, batch, block_length, share_prompts=share_prompts)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert_same_gradients(gradients(model, (got * weight).sum()), gradients(model, (expected * weight).sum()))


@pytest.mark.parametrize("family", BLOCK)
@pytest.mark.parametrize("attn_implementation", ["eager", "flex_attention"])
def test_attention_implementations_agree(family, attn_implementation):
    batch = make_batch(4)
    with torch.no_grad():
        expected = packed_logps(tiny_model(family), batch, 4)
        got = packed_logps(tiny_model(family, attn_implementation), batch, 4)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", BLOCK)
def test_gradient_checkpointing_changes_nothing(family):
    model, batch = tiny_model(family), make_batch(4)
    expected = gradients(model, packed_logps(model, batch, 4).sum())
    model.train()
    model.gradient_checkpointing_enable()
    assert_same_gradients(gradients(model, packed_logps(model, batch, 4).sum()), expected)


@pytest.mark.parametrize("family", BLOCK)
def test_long_sequences_keep_products_only(family, monkeypatch):
    """The same gradients, and far fewer bytes kept between forward and backward."""

    def run(large):
        model, kept = tiny_model(family).train(), {}
        monkeypatch.setattr("dllm_trl.modeling.base.LARGE", large)

        def pack(tensor):
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logps = packed_logps(model, make_batch(4), 4).sum()
        assert not any(layer.gradient_checkpointing for layer in model.model.layers)
        return gradients(model, logps), sum(kept.values())

    (everything, all_bytes), (products, few_bytes) = run(10**12), run(0)
    assert_same_gradients(products, everything)
    assert few_bytes < 0.6 * all_bytes
    with torch.no_grad():
        packed_logps(tiny_model(family).train(), make_batch(4), 4)


def test_matrix_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "packing.md").read_text()
    lines = page.split("```text\n")[1].split("```")[0].splitlines()
    names = lines[0].split()
    prompt_ids, prompt_mask = left_pad([[0, 1, 2]])
    canvas = torch.tensor([[3, 4, 5, 6, 7]])
    step = torch.tensor([[0, 0, 1, 0, 0]])
    rounds = [Round(masked=step >= r, scored=step == r) for r in range(2)]
    packed = pack(prompt_ids, prompt_mask, canvas, torch.ones_like(canvas), rounds, block_length=2, mask_token_id=MASK)
    tokens = zip(packed.input_ids[0].tolist(), packed.position_ids[0].tolist(), strict=True)
    assert names == [f"*{position}" if token == MASK else str(token) for token, position in tokens]
    drawn = [line.split()[: len(names) + 1] for line in lines[1:]]
    assert [row[0] for row in drawn] == names
    assert torch.equal(torch.tensor([[c == "x" for c in row[1:]] for row in drawn]), packed.plan.dense()[0, 0])
