"""The invariants of decoding: nothing but the prompt, the parameters and the seed decides what a row becomes."""

from functools import partial

import numpy as np
import pytest
import torch

from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from dllm_trl.generation.decoder import Decoder
from dllm_trl.generation.samplers import SAMPLERS, TokenScores, make_sampler
from dllm_trl.generation.sampling import draw, mix, uniform
from dllm_trl.types import Grid, Round
from tests.scoring.packing import pack

from .conftest import MASK, VOCAB, forwards, left_pad, ragged_prompts


STRATEGIES = sorted(SAMPLERS)
FIELDS = ("completion_ids", "completion_mask", "canvas_ids", "canvas_mask", "step_map", "num_forward_passes")
BOUNDS = {"threshold_lower": 0.1, "threshold_upper": 0.3}


def config(**kwargs):
    kwargs.setdefault("max_new_tokens", 10)
    kwargs.setdefault("confidence_threshold", 0.5)
    kwargs.setdefault("entropy_bound", 1.0)
    kwargs = BOUNDS | kwargs
    return DiffusionGenerationConfig(**{"eos_token_id": -1, **kwargs})


def assert_same(a, b, rows_a=slice(None), rows_b=slice(None)):
    width = min(a.canvas_ids.size(1), b.canvas_ids.size(1))
    for field in FIELDS:
        x, y = getattr(a, field)[rows_a], getattr(b, field)[rows_b]
        if x.dim() == 2:
            x, y = x[:, :width], y[:, :width]
        assert torch.equal(x, y), field
    difference = (a.logprobs[rows_a][:, :width] - b.logprobs[rows_b][:, :width]).abs().max()
    assert difference < 1e-4


def draw_uniform(*counters):
    return torch.from_numpy(uniform(*counters, 1))


def predictions(model, ids, start, end, block):
    """Logits for the block's tokens: in place, or of a shifted head one token earlier."""
    logits = model(input_ids=ids[None, :end], block_length=block).logits[0]
    first = start - model.config.logit_shift
    return logits[first : first + end - start] if first >= 0 else torch.cat([logits[:1], logits[: end - 1]])


@torch.no_grad()
def uncached(model, prompt, limit, block, steps, strategy, seed, temperature, threshold, bound):
    """Block diffusion decoding from its definition: a full forward over everything known at every step, no cache."""
    row_seed = mix(seed, 0, 0)
    ids = torch.tensor(prompt + [MASK] * limit)
    step_map, logprobs = torch.full((limit,), -1), torch.zeros(limit)
    commits = 0
    for start in range(len(prompt) // block * block, len(ids), block):
        end = min(start + block, len(ids))
        open_positions = torch.arange(start, end) >= len(prompt)
        for step in range(10**6):
            masked = open_positions.clone()
            masked[: end - start] &= ids[start:end] == MASK
            if not masked.any():
                break
            logits = predictions(model, ids, start, end, block)[masked].float()
            logits = logits / (temperature or 1)
            log_probs = logits.log_softmax(-1)
            allowed = log_probs.clone()
            allowed[:, MASK] = -torch.inf
            positions = np.arange(start, end)[masked.numpy()]
            if temperature:
                tokens = draw(allowed, torch.from_numpy(uniform(row_seed, positions, step, 0)))
            else:
                tokens = allowed.argmax(-1)
            picked = log_probs.gather(-1, tokens[:, None])[:, 0]
            noise = partial(draw_uniform, row_seed, positions, step)
            done = torch.full((1, block), torch.nan)
            for place in range(max(start, len(prompt)), end):
                if ids[place] != MASK:
                    done[0, place - start] = logprobs[place - len(prompt)]
            scores = TokenScores(masked[None], picked, log_probs, noise, committed_log_probs=lambda done=done: done)
            quota = torch.tensor([block // steps + (step < block % steps)])
            kwargs = {"confidence_threshold": threshold, "entropy_bound": bound, **BOUNDS}
            commit = make_sampler(strategy, kwargs)(scores, masked[None], quota)[0]
            where = commit.nonzero()[:, 0] + start
            ids[where] = tokens[commit[masked]]
            step_map[where - len(prompt)] = commits
            logprobs[where - len(prompt)] = picked[commit[masked]]
            commits += 1
    return ids[len(prompt) :], step_map, logprobs


@pytest.mark.parametrize("block, steps", [(4, 4), (4, 3), (1, 1), (8, 3)])
@pytest.mark.parametrize("strategy, temperature", [*((name, 0.8) for name in STRATEGIES), ("sequential", 0.0)])
def test_cached_equals_uncached(model, strategy, temperature, block, steps):
    for size, fused in zip((3, 8, 13), [*forwards(model), *forwards(model), False]):
        prompt = ragged_prompts((size,))[0]
        parameters = config(
            block_length=block,
            denoising_steps=steps,
            remasking_strategy=strategy,
            temperature=temperature,
            do_sample=temperature > 0,
            max_new_tokens=11,
        )
        rollout = generate_rollouts(model, [prompt], parameters, seed=7, fused=fused)
        ids, step_map, logprobs = uncached(model, prompt, 11, block, steps, strategy, 7, temperature, 0.5, 1.0)
        assert torch.equal(rollout.canvas_ids[0], ids)
        assert torch.equal(rollout.step_map[0], step_map)
        torch.testing.assert_close(rollout.logprobs[0], logprobs, atol=1e-4, rtol=0)


def test_greedy_cached_equals_uncached(model):
    prompt = ragged_prompts((6,))[0]
    for fused in forwards(model):
        rollout = generate_rollouts(model, [prompt], config(max_new_tokens=14), seed=1, fused=fused)
        ids, step_map, logprobs = uncached(model, prompt, 14, 4, 4, "low_confidence_dynamic", 1, 0, 0.5, 1.0)
        assert torch.equal(rollout.canvas_ids[0], ids) and torch.equal(rollout.step_map[0], step_map)
        torch.testing.assert_close(rollout.logprobs[0], logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_results_depend_on_nothing_but_the_row(model, strategy):
    prompts, limits = ragged_prompts((5, 1, 8, 11, 4)), [9, 12, 5, 3, 17]  # 8 and 4 end on the edge of a block
    parameters = config(
        remasking_strategy=strategy,
        denoising_steps=3,
        do_sample=True,
        temperature=0.9,
        top_k=20,
        top_p=0.95,
        eos_token_id=[7, 20, 33],
    )
    together = generate_rollouts(model, prompts, parameters, 2, limits, seed=3)
    assert together.step_map.max() > 0
    for fused in forwards(model):
        for slots in (1, 3, 100):
            assert_same(together, generate_rollouts(model, prompts, parameters, 2, limits, slots, seed=3, fused=fused))
        for i, prompt in enumerate(prompts):
            kwargs = {"seed": 3, "index_offset": i, "fused": fused}
            alone = generate_rollouts(model, [prompt], parameters, 2, limits[i], **kwargs)
            assert_same(alone, together, rows_b=slice(2 * i, 2 * i + 2))


def test_other_seeds_and_siblings_differ(model):
    prompts = ragged_prompts((6, 6))
    parameters = config(do_sample=True, max_new_tokens=24)
    first = generate_rollouts(model, prompts, parameters, 3, seed=1)
    assert torch.equal(first.canvas_ids, generate_rollouts(model, prompts, parameters, 3, seed=1).canvas_ids)
    assert not torch.equal(first.canvas_ids, generate_rollouts(model, prompts, parameters, 3, seed=2).canvas_ids)
    assert len({tuple(row.tolist()) for row in first.canvas_ids}) == 6


def test_left_padding_changes_nothing(model):
    prompts = ragged_prompts()
    batch = model.generate(**left_pad(prompts), generation_config=config(), return_dict_in_generate=True)
    for i, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), generation_config=config(), return_dict_in_generate=True)
        for field in ("canvas_ids", "step_map", "num_forward_passes"):
            assert torch.equal(getattr(alone, field)[0], getattr(batch, field)[i]), field
        assert torch.equal(alone.sequences[0, len(prompt) :], batch.sequences[i, -10:])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_step_map_replays_to_the_same_tokens_and_log_probs(model, strategy):
    """Reveal what `step_map` says was known, one forward per step: the same argmax, the same numbers."""
    prompt = ragged_prompts((7,))[0]
    rollout = generate_rollouts(model, [prompt], config(remasking_strategy=strategy, max_new_tokens=13))
    ids, step_map = rollout.canvas_ids[0], rollout.step_map[0]
    blocks = (torch.arange(13) + len(prompt)) // 4
    assert sorted(set(step_map.tolist())) == list(range(int(step_map.max()) + 1))
    for earlier, later in zip(blocks.unique()[:-1], blocks.unique()[1:], strict=True):
        assert step_map[blocks == earlier].max() < step_map[blocks == later].min()
    for step in range(int(step_map.max()) + 1):
        here = step_map == step
        end = len(prompt) + int((blocks <= blocks[here][0]).sum())
        canvas = torch.cat([torch.tensor(prompt), ids.where(step_map < step, MASK)])[:end]
        with torch.no_grad():
            logits = model(input_ids=canvas[None]).logits[0]
        where = here.nonzero()[:, 0]
        log_probs = logits[where + len(prompt) - model.config.logit_shift].log_softmax(-1)
        torch.testing.assert_close(
            log_probs.gather(-1, ids[where][:, None])[:, 0], rollout.logprobs[0, where], atol=1e-4, rtol=0
        )
        assert torch.equal(log_probs[:, :MASK].argmax(-1), ids[where])


def test_a_rows_forwards_are_its_denoising_steps(model, monkeypatch):
    """No forward that only commits: the loop runs once per denoising step, whatever the number of blocks."""
    calls = []
    step = Decoder._step
    monkeypatch.setattr(Decoder, "_step", lambda self: (calls.append(len(self.rows)), step(self)))
    for fused in forwards(model):
        calls.clear()
        rollout = generate_rollouts(model, ragged_prompts((5,)), config(max_new_tokens=18), fused=fused)
        assert len(calls) == int(rollout.num_forward_passes[0]) == int(rollout.step_map.max()) + 1
        calls.clear()
        rollout = generate_rollouts(model, ragged_prompts(), config(max_new_tokens=18), num_slots=2, fused=fused)
        assert sum(calls) == int(rollout.num_forward_passes.sum())
        assert torch.equal(rollout.num_forward_passes, rollout.step_map.max(-1).values + 1)


def test_one_prefill_per_group(model, monkeypatch):
    from dllm_trl.generation.forward import StockForward
    from dllm_trl.generation.fused_forward import FusedForward

    tokens = []
    for cls in (StockForward, FusedForward):
        prefill = cls.prefill
        monkeypatch.setattr(
            cls, "prefill", lambda self, ps, n, f=prefill: (tokens.extend(map(len, ps)), f(self, ps, n))[1]
        )
    a, b = ragged_prompts((10, 13))
    for fused in forwards(model):
        tokens.clear()
        generate_rollouts(model, [a, b], config(do_sample=True), num_generations=4, num_slots=3, fused=fused)
        assert sorted(tokens) == [8, 12]  # whole blocks only, once per prompt although the groups straddle the slots
        tokens.clear()
        generate_rollouts(model, [a, a, b, b], config(), num_slots=1, fused=fused)  # equal prompts share by content
        assert sorted(tokens) == [8, 12]


def test_max_new_tokens_is_exact(model):
    """The last block is shortened: what lies beyond the limit never exists."""
    prompt = ragged_prompts((6,))[0]
    for limit in range(1, 12):
        rollout = generate_rollouts(model, [prompt], config(max_new_tokens=limit))
        assert rollout.completion_mask.sum() == rollout.canvas_mask.sum() == limit
        ids, step_map, _ = uncached(model, prompt, limit, 4, 4, "low_confidence_dynamic", 0, 0, 0.5, 1.0)
        assert torch.equal(rollout.canvas_ids[0], ids) and torch.equal(rollout.step_map[0], step_map)


def test_eos_acts_when_its_block_is_full(model):
    prompt = ragged_prompts((6,))[0]
    free = generate_rollouts(model, [prompt], config(max_new_tokens=18, do_sample=True), seed=1)
    ids = free.canvas_ids[0].tolist()
    # a token inside a block (not its last), seen here for the first time
    position = next(i for i in range(2, 18) if (6 + i) % 4 != 3 and ids[i] not in ids[:i] and ids[i] not in prompt)
    rollout = generate_rollouts(
        model, [prompt], config(max_new_tokens=18, do_sample=True, eos_token_id=ids[position]), seed=1
    )
    block_end = position + 4 - (6 + position) % 4
    assert rollout.completion_mask.sum() == position + 1
    assert rollout.completion_ids[0, : position + 1].tolist() == ids[: position + 1]
    assert rollout.canvas_mask.sum() == block_end
    assert rollout.canvas_ids[0, :block_end].tolist() == ids[:block_end]
    assert rollout.step_map[0, :block_end].tolist() == free.step_map[0, :block_end].tolist()
    kwargs = {"max_new_tokens": 18, "do_sample": True, "seed": 1, "confidence_threshold": 0.5}
    output = model.generate(torch.tensor([prompt]), eos_token_id=ids[position], **kwargs)
    pads = [model.config.pad_token_id] * (block_end - position - 1)
    assert output[0].tolist() == prompt + ids[: position + 1] + pads


def test_eos_in_the_prompt_does_not_end_the_row(model):
    prompt = ragged_prompts((6,))[0]
    free = generate_rollouts(model, [prompt], config())
    eos = prompt[-1]  # shares the first block with the response
    assert eos not in free.canvas_ids[0, :2]
    rollout = generate_rollouts(model, [prompt], config(eos_token_id=eos))
    assert rollout.canvas_mask.sum() > 2


def test_the_mask_token_is_never_sampled(model):
    ids = torch.tensor(ragged_prompts((8,)))
    with torch.no_grad():
        saved = model.lm_head.weight[MASK].clone()
        model.lm_head.weight[MASK] = 2 * model.lm_head.weight[model(ids).logits[0, -1].argmax()]
    try:
        assert (model(ids).logits.argmax(-1) == MASK).any()
        for do_sample in (False, True):
            rollout = generate_rollouts(model, ragged_prompts(), config(max_new_tokens=20, do_sample=do_sample))
            assert (rollout.canvas_ids != MASK).all()
        suppressed = list(range(10, MASK))
        rollout = generate_rollouts(model, ragged_prompts(), config(suppress_tokens=suppressed, do_sample=True))
        assert (rollout.canvas_ids < 10).all()
    finally:
        with torch.no_grad():
            model.lm_head.weight[MASK] = saved


def test_log_probs_are_those_of_the_whole_vocabulary(model):
    """Filters change what is drawn, not the number a trainer computes: temperature-scaled, over every id."""
    prompt, shift = ragged_prompts((8,))[0], model.config.logit_shift
    parameters = config(do_sample=True, temperature=0.7, top_k=3, block_length=1, max_new_tokens=6)
    rollout = generate_rollouts(model, [prompt], parameters, seed=0)
    ids = torch.tensor(prompt)
    for token, log_prob in zip(rollout.canvas_ids[0], rollout.logprobs[0], strict=True):
        with torch.no_grad():
            logits = model(torch.cat([ids, torch.tensor([MASK])])[None], block_length=1).logits[0, -1 - shift] / 0.7
        assert token in logits[:MASK].topk(3).indices
        torch.testing.assert_close(logits.log_softmax(-1)[token], log_prob, atol=1e-4, rtol=0)
        ids = torch.cat([ids, token[None]])


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    count = 20000
    points = torch.from_numpy(uniform(mix(5, 0, 0), np.arange(count), 0, 0))
    assert points.min() >= 0 and points.max() < 1
    tokens = draw(logits.expand(count, -1), points)
    torch.testing.assert_close(tokens.bincount() / count, logits.exp(), atol=0.012, rtol=0)
    # the last id is forbidden and the point is as close to 1 as it gets
    edge = draw(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([1 - 2**-24]))
    assert edge.item() == 1


def test_dream_schedule(model):
    """int(masked * (1 - s / t)): a forward may commit nothing, which counts as a forward and not as a step."""
    prompt = ragged_prompts((8,))[0]
    parameters = config(
        denoising_schedule="dream", denoising_steps=6, remasking_strategy="low_confidence_static", max_new_tokens=4
    )
    rollout = generate_rollouts(model, [prompt], parameters)
    times, masked, expected = np.linspace(1, 1e-3, 7), 4, []
    for i in range(6):
        count = masked if i == 5 else int(masked * (1 - times[i + 1] / times[i]))
        expected.append(count)
        masked -= count
    assert 0 in expected and rollout.num_forward_passes.item() == 6
    assert rollout.step_map[0].bincount().tolist() == [count for count in expected if count]


def test_rollout_layout(model):
    prompts = ragged_prompts((5, 9))
    rollout = generate_rollouts(model, prompts, config(do_sample=True), num_generations=2, max_new_tokens=[3, 6])
    assert rollout.prompt_ids.shape == (4, 9) and rollout.canvas_ids.shape == (4, 6)
    for i, row in enumerate(rollout.prompt_ids):
        assert row[rollout.prompt_mask[i].bool()].tolist() == prompts[i // 2]
    assert rollout.prompt_mask[0].tolist() == [0] * 4 + [1] * 5
    assert rollout.completion_mask.sum(-1).tolist() == [3, 3, 6, 6]
    assert (rollout.step_map[:2, 3:] == -1).all() and (rollout.logprobs[:2, 3:] == 0).all()
    assert rollout.tokens_per_forward == 18 / rollout.num_forward_passes.sum().item()
    assert rollout.grid == Grid.of(model.config.diffusion_attention, 4) and rollout.canvas_ids.max() < VOCAB


def test_generate_rollouts_rejects_bad_input(model):
    for kwargs, message in [
        ({"prompts": []}, "`prompts` is empty"),
        ({"prompts": [[]]}, "Prompt 0 is empty"),
        ({"prompts": [[1] * 250], "max_new_tokens": 10}, "context of 256"),
        ({"prompts": [[1]], "num_generations": 0}, "`num_generations` must be an integer of at least 1"),
        ({"prompts": [[1]], "num_slots": 0}, "`num_slots` must be an integer of at least 1"),
        ({"prompts": [[1], [2]], "max_new_tokens": [3]}, "`max_new_tokens` must be"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "`max_new_tokens` must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate_rollouts(model, **kwargs)


@pytest.mark.parametrize("block", [1, 4, 32])
def test_packed_rounds_read_the_log_probs_of_the_rollout(model, block):
    """One pass over all steps of all rows, as a trainer makes it: the numbers that were recorded step by step."""
    parameters = config(block_length=block, denoising_steps=3, temperature=0.8, eos_token_id=[7, 20, 33])
    prompts = ragged_prompts((5, 1, 8, 11, 4))
    rollout = generate_rollouts(model, prompts, parameters, max_new_tokens=14, num_slots=3, seed=3)
    steps = rollout.step_map
    rounds = [Round(masked=steps >= step, scored=steps == step) for step in range(int(steps.max()) + 1)]
    packed = pack(
        rollout.prompt_ids,
        rollout.prompt_mask,
        rollout.canvas_ids,
        rollout.canvas_mask,
        rounds,
        block_length=block,
        mask_token_id=MASK,
        logit_shift=model.config.logit_shift,
    )
    with torch.no_grad():
        logits = model(
            packed.input_ids, position_ids=packed.position_ids, plan=packed.plan, score_index=packed.score_index
        ).logits
    log_probs = (logits[0] / 0.8).log_softmax(-1).gather(-1, packed.labels[:, None]).squeeze(-1)
    torch.testing.assert_close(packed.scatter(log_probs).sum(0), rollout.logprobs, atol=1e-4, rtol=0)
