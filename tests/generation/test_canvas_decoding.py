"""Full attention: what a row becomes is its definition, with and without a cache, and nothing else decides it."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from dllm_trl.generation import DiffusionGenerationConfig, denoising_steps_per_block, generate_rollouts
from dllm_trl.generation.cache import SlotCache
from dllm_trl.generation.fused_forward import FusedForward
from dllm_trl.generation.samplers import SAMPLERS, TokenScores, make_sampler
from dllm_trl.generation.samplers import parameters as parameters_of_strategies
from dllm_trl.generation.sampling import draw, mix, uniform
from tests.trainers.tiny_rl import FULL, make_model

from .conftest import left_pad


MASK, PAD = 2, 0
CACHES = {
    "none": {},
    "prefix": {},
    "horizon": {"refresh_interval": 2},
    "dual": {},
}
FIELDS = ("completion_ids", "completion_mask", "canvas_ids", "canvas_mask", "step_map", "num_forward_passes")


def ragged_prompts(sizes=(5, 1, 8, 11, 3), seed=0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, 50, (n,), generator=generator).tolist() for n in sizes]


@pytest.fixture(scope="module", params=FULL)
def model(request):
    return make_model(request.param).eval()


@pytest.fixture(scope="module")
def llada():
    return make_model("llada").eval()


def skip_unless_covered(model, fused):
    if fused and not FusedForward.supports(model):
        pytest.skip("the fused forward does not cover this family")


def config(cache="none", **kwargs):
    values = {
        "max_new_tokens": 10,
        "block_length": 4,
        "denoising_schedule": "even",
        "confidence_threshold": 0.3,
        "entropy_bound": 1.0,
        "threshold_lower": 0.1,
        "threshold_upper": 0.3,
        "eos_token_id": -1,
        "cache": "prefix" if cache == "horizon" else cache,
        **CACHES[cache],
    }
    return DiffusionGenerationConfig(**(values | kwargs))


def assert_same(a, b, rows_b=slice(None)):
    width = min(a.canvas_ids.size(1), b.canvas_ids.size(1))
    for field in FIELDS:
        x, y = getattr(a, field), getattr(b, field)[rows_b]
        if x.dim() == 2:
            x, y = x[:, :width], y[:, :width]
        assert torch.equal(x, y), field
    assert (a.logprobs[:, :width] - b.logprobs[rows_b][:, :width]).abs().max() < 1e-4


def predictions(model, ids, start, stop, step, kept, cache):
    """Logits of tokens `start .. stop - 1`, and the keys and values that later steps of the block go on with."""
    shift = model.config.logit_shift
    if cache == "none" or step == 0:
        kept = DynamicCache(config=model.config)
        logits = model(input_ids=ids[None], past_key_values=kept, use_cache=True).logits[0]
        return logits[start - shift : stop - shift], [
            (layer.keys.clone(), layer.values.clone()) for layer in kept.layers
        ]
    last, old = len(ids), list(range(start))
    if cache == "dual":
        last, old = stop, old + list(range(stop, len(ids)))
    if cache == "horizon":
        last = min(stop + CACHES[cache]["refresh_interval"], last)
    past = DynamicCache(config=model.config)
    for i, (keys, values) in enumerate(kept):
        past.update(keys[:, :, old], values[:, :, old], i)
    positions = torch.arange(start, last)[None]
    mask = torch.ones(1, 1, last - start, len(old) + last - start, dtype=torch.bool)
    kwargs = {"position_ids": positions, "past_key_values": past, "attention_mask": mask, "use_cache": True}
    logits = model(input_ids=ids[None, start:last], **kwargs).logits[0, : stop - start]
    return (torch.cat([logits[:1], logits[:-1]]) if shift else logits), kept


@torch.no_grad()
def definition(model, prompt, parameters, seed, cache, limit=None):
    """Decoding of a canvas as DESIGN and the public code define it, one row at a time, on stock modules."""
    p, shift = parameters, model.config.logit_shift
    limit = limit or p.max_new_tokens
    block, row_seed = p.block_length or limit, mix(seed, 0, 0)
    ids = torch.tensor(prompt + [MASK] * limit)
    twin = torch.tensor([MASK] * len(ids))
    step_map, logprobs = torch.full((limit,), -1), torch.zeros(limit)
    commits = forwards = 0
    never = [MASK, *model.config.suppressed_token_ids, *(p.suppress_tokens or [])]
    for start in range(len(prompt), len(ids), block):
        stop = min(start + block, len(ids))
        kept = twin_kept = None
        steps = p.denoising_steps or stop - start
        for step in range(10**6):
            masked = ids[start:stop] == MASK
            if not masked.any():
                break
            c, kept = predictions(model, ids, start, stop, step, kept, cache)
            guided = c
            if p.cfg_scale:
                twin[len(prompt) :] = ids[len(prompt) :]
                u, twin_kept = predictions(model, twin, start, stop, step, twin_kept, cache)
                guided = u + (p.cfg_scale + 1) * (c - u)
            forced = cache != "none" and shift and step == 0
            if forced:
                masked = torch.arange(stop - start) == 0
            forwards += 1
            temperature = p.temperature or 1
            log_probs = (guided[masked] / temperature).log_softmax(-1)
            allowed = log_probs.clone()
            allowed[:, never] = -torch.inf
            positions = np.arange(start, stop)[masked.numpy()]
            if p.temperature:
                tokens = draw(allowed, torch.from_numpy(uniform(row_seed, positions, step, 0)))
            else:
                tokens = allowed.argmax(-1)
            picked = log_probs.gather(-1, tokens[:, None])[:, 0]
            noise = partial(lambda n, s: torch.from_numpy(uniform(row_seed, n, s, 1)), positions, step)
            mine = slice(start - len(prompt), stop - len(prompt))
            done = logprobs[None, mine].masked_fill(ids[None, start:stop] == MASK, torch.nan)
            scores = TokenScores(masked[None], picked, log_probs, noise, committed_log_probs=lambda done=done: done)
            if p.denoising_schedule == "dream":
                times, now = np.linspace(1, 1e-3, steps + 1), min(step, steps - 1)
                share = 1 - times[now + 1] / times[now]
                quota = int(masked.sum() * (share if now < steps - 1 else 1))
            else:
                width = stop - start
                quota = width // steps + (step < width % steps) if step < steps else int(masked.sum())
            kwargs = {name: getattr(p, name) for name in parameters_of_strategies()}
            quota = torch.tensor([max(quota, forced)])
            commit = make_sampler(p.remasking_strategy, kwargs)(scores, masked[None], quota)[0]
            where = commit.nonzero()[:, 0] + start
            ids[where] = tokens[commit[masked]]
            step_map[where - len(prompt)] = commits
            recorded = (c[masked] / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            logprobs[where - len(prompt)] = recorded[commit[masked]]
            commits += bool(commit.any())
    return ids[len(prompt) :], step_map, logprobs, forwards


def assert_is_its_definition(model, parameters, cache, sizes=(3, 8), fused=None):
    for size in sizes:
        prompt = ragged_prompts((size,))[0]
        rollout = generate_rollouts(model, [prompt], parameters, seed=7, fused=fused)
        ids, step_map, logprobs, forwards = definition(model, prompt, parameters, 7, cache)
        assert torch.equal(rollout.canvas_ids[0], ids)
        assert torch.equal(rollout.step_map[0], step_map)
        torch.testing.assert_close(rollout.logprobs[0], logprobs, atol=1e-4, rtol=0)
        assert rollout.num_forward_passes.tolist() == [forwards]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("strategy", sorted(SAMPLERS))
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_decoding_is_its_definition(model, strategy, cache, temperature):
    values = {"remasking_strategy": strategy, "temperature": temperature, "do_sample": temperature > 0}
    assert_is_its_definition(model, config(cache, max_new_tokens=11, cfg_scale=0.0, **values), cache)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("cache", CACHES)
def test_guidance_is_its_definition(model, cache, fused):
    skip_unless_covered(model, fused)
    for scale in (0.5, 2.0):
        parameters = config(cache, cfg_scale=scale, remasking_strategy="low_confidence_dynamic", temperature=0.0)
        assert_is_its_definition(model, parameters, cache, fused=fused)
    plain = generate_rollouts(model, ragged_prompts((8,)), config(cache))
    guided = generate_rollouts(model, ragged_prompts((8,)), config(cache, cfg_scale=2.0))
    assert not torch.equal(plain.canvas_ids, guided.canvas_ids)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("schedule", ["even", "dream"])
@pytest.mark.parametrize("block, steps", [(None, None), (None, 4), (4, 2), (8, 3), (1, 1)])
def test_blocks_steps_and_schedules(model, block, steps, schedule, cache):
    values = {"block_length": block, "denoising_steps": steps, "denoising_schedule": schedule, "cfg_scale": 0.0}
    parameters = config(cache, remasking_strategy="low_confidence_static", temperature=0.0, **values)
    assert_is_its_definition(model, parameters, cache, sizes=(6,))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("cache", CACHES)
def test_results_depend_on_nothing_but_the_row(model, cache, guidance, fused):
    skip_unless_covered(model, fused)
    prompts, limits = ragged_prompts(), [9, 12, 5, 3, 17]
    parameters = config(cache, do_sample=True, temperature=0.9, top_k=20, top_p=0.95, cfg_scale=guidance)
    together = generate_rollouts(model, prompts, parameters, 2, limits, seed=3, fused=fused)
    assert together.canvas_ids.size(1) == 17 and together.canvas_mask.sum(-1).tolist() == np.repeat(limits, 2).tolist()
    for slots in (1, 3, 100):
        assert_same(together, generate_rollouts(model, prompts, parameters, 2, limits, slots, seed=3, fused=fused))
    for i, prompt in enumerate(prompts):
        kwargs = {"seed": 3, "index_offset": i, "fused": fused}
        alone = generate_rollouts(model, [prompt], parameters, 2, limits[i], **kwargs)
        assert_same(alone, together, slice(2 * i, 2 * i + 2))


def test_a_whole_response_is_the_rows_own(model):
    """`block_length=None`: a row's block, steps and schedule are those of its own `max_new_tokens`."""
    prompts, limits = ragged_prompts((5, 8, 3)), [4, 11, 7]
    for schedule in ("even", "dream"):
        parameters = config(block_length=None, denoising_schedule=schedule)
        together = generate_rollouts(model, prompts, parameters, 1, limits, seed=1)
        for i, prompt in enumerate(prompts):
            alone = generate_rollouts(model, [prompt], parameters, 1, limits[i], seed=1, index_offset=i)
            assert_same(alone, together, slice(i, i + 1))


def test_other_seeds_and_siblings_differ(model):
    prompts = ragged_prompts((6, 6))
    parameters = config(do_sample=True, max_new_tokens=24)
    first = generate_rollouts(model, prompts, parameters, 3, seed=1)
    assert not torch.equal(first.canvas_ids, generate_rollouts(model, prompts, parameters, 3, seed=2).canvas_ids)
    assert len({tuple(row.tolist()) for row in first.canvas_ids}) == 6


@pytest.mark.parametrize("cache", CACHES)
def test_left_padding_changes_nothing(model, cache):
    prompts = ragged_prompts()
    kwargs = {"generation_config": config(cache), "return_dict_in_generate": True}
    batch = model.generate(**left_pad(prompts), **kwargs)
    for i, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), **kwargs)
        for field in ("canvas_ids", "step_map", "num_forward_passes"):
            assert torch.equal(getattr(alone, field)[0], getattr(batch, field)[i]), field
        assert torch.equal(alone.sequences[0, len(prompt) :], batch.sequences[i, -10:])


@pytest.mark.parametrize("strategy", sorted(SAMPLERS))
def test_step_map_replays_to_the_same_log_probs(model, strategy):
    """One forward per step, of the canvas as `step_map` says it was: the numbers that a trainer computes."""
    prompt, shift = ragged_prompts((7,))[0], model.config.logit_shift
    parameters = config(remasking_strategy=strategy, max_new_tokens=13, do_sample=True, temperature=0.7, top_k=9)
    rollout = generate_rollouts(model, [prompt], parameters, seed=2)
    ids, step_map = rollout.canvas_ids[0], rollout.step_map[0]
    assert sorted(set(step_map.tolist())) == list(range(int(step_map.max()) + 1))
    blocks = torch.arange(13) // 4
    for earlier in range(3):
        assert step_map[blocks == earlier].max() < step_map[blocks == earlier + 1].min()
    for step in range(int(step_map.max()) + 1):
        canvas = torch.cat([torch.tensor(prompt), ids.where(step_map < step, MASK)])
        where = (step_map == step).nonzero()[:, 0]
        with torch.no_grad():
            logits = model(input_ids=canvas[None]).logits[0, where + len(prompt) - shift] / 0.7
        log_probs = logits.log_softmax(-1).gather(-1, ids[where][:, None])[:, 0]
        torch.testing.assert_close(log_probs, rollout.logprobs[0, where], atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache", CACHES)
def test_eos_acts_when_its_block_is_full(model, cache):
    prompt = ragged_prompts((6,))[0]
    kwargs = {"max_new_tokens": 18, "do_sample": True}
    free = generate_rollouts(model, [prompt], config(cache, **kwargs), seed=1)
    ids = free.canvas_ids[0].tolist()
    position = next(i for i in range(2, 14) if i % 4 != 3 and ids[i] not in ids[:i])
    rollout = generate_rollouts(model, [prompt], config(cache, eos_token_id=ids[position], **kwargs), seed=1)
    end = position // 4 * 4 + 4
    assert rollout.completion_mask.sum() == position + 1
    assert rollout.completion_ids[0, : position + 1].tolist() == ids[: position + 1]
    assert rollout.canvas_ids[0].tolist() == ids[:end] + [MASK] * (18 - end)
    assert rollout.canvas_mask.sum() == 18
    assert rollout.step_map[0].tolist() == free.step_map[0, :end].tolist() + [-1] * (18 - end)
    assert (rollout.logprobs[0, end:] == 0).all()
    assert rollout.num_forward_passes[0] < free.num_forward_passes[0]
    output = model.generate(torch.tensor([prompt]), config(cache, eos_token_id=ids[position], **kwargs), seed=1)
    assert output[0].tolist() == prompt + ids[: position + 1] + [PAD] * (17 - position)


def test_an_approximate_cache_that_is_always_fresh_is_exact(model):
    """Every step is the first of its block: with one token per block, or (without shift) where all are committed."""
    prompts = ragged_prompts()
    exact = generate_rollouts(model, prompts, config(block_length=1))
    for cache in CACHES:
        assert_same(generate_rollouts(model, prompts, config(cache, block_length=1)), exact)
    values = {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.0, "denoising_steps": 1}
    exact = generate_rollouts(model, prompts, config(**values, max_new_tokens=12))
    assert (exact.num_forward_passes == 3).all()
    for cache in ("prefix", "dual", "horizon"):
        cached = generate_rollouts(model, prompts, config(cache, **values, max_new_tokens=12))
        if model.config.logit_shift:  # the first token in the first step, all others in the second
            assert (cached.num_forward_passes == 6).all()
        else:
            assert_same(cached, exact)


def test_caches_differ_and_compute_less(llada, monkeypatch):
    tokens, step = [], FusedForward.step
    monkeypatch.setattr(
        FusedForward,
        "step",
        lambda self, units, cache: (tokens.append(units.ids.numel()), step(self, units, cache))[1],
    )
    spent, results = {}, {}
    for cache in CACHES:
        tokens.clear()
        parameters = config(cache, max_new_tokens=32, block_length=8, remasking_strategy="low_confidence_static")
        results[cache] = generate_rollouts(llada, ragged_prompts((8,)), parameters).canvas_ids
        spent[cache] = sum(tokens)
    assert spent["none"] == 32 * 40 and spent["dual"] == 4 * 40 + 28 * 8
    assert spent["prefix"] == 4 * 40 + 7 * (32 + 24 + 16 + 8) and spent["horizon"] == 4 * 40 + 7 * (10 * 3 + 8)
    assert len({tuple(ids[0].tolist()) for ids in results.values()}) > 1


def test_no_cache_allocates_none(llada, monkeypatch):
    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(SlotCache, "__init__", refuse)
    generate_rollouts(llada, ragged_prompts(), config())


def test_image_codes_are_never_sampled():
    model = make_model("mmada").eval()
    codes = list(model.config.suppressed_token_ids)
    with torch.no_grad():
        model.lm_head.weight[codes] = model.lm_head.weight[6:40].mean(0) + 1
        model.lm_head.weight[codes] *= 20
    prompts = torch.tensor(ragged_prompts((8,)))
    free = model.generate(prompts, config(), suppress_tokens=[])[0, 8:]
    assert torch.isin(free, torch.tensor(codes)).any()
    assert not torch.isin(model.generate(prompts, config())[0, 8:], torch.tensor(codes)).any()
    own = model.generate(prompts, config(suppress_tokens=[int(free[0])]))[0, 8:]  # the caller's list replaces ours
    assert free[0] not in own and not torch.equal(own, free)


def test_suppressed_eos_has_no_probability(llada):
    prompts = ragged_prompts((8, 5))
    free = generate_rollouts(llada, prompts, config(max_new_tokens=16))
    eos = [int(free.canvas_ids[0, 0]), int(free.canvas_ids[1, 2])]
    rollout = generate_rollouts(llada, prompts, config(max_new_tokens=16, eos_token_id=eos, suppress_eos=True))
    assert not torch.isin(rollout.canvas_ids, torch.tensor(eos)).any() and (rollout.completion_mask == 1).all()
    # recorded: of the model as it is; ranked by: of the model that cannot say EOS
    prompt = torch.tensor(prompts[0])
    parameters = config(block_length=4, max_new_tokens=4, eos_token_id=eos, suppress_eos=True, denoising_steps=2)
    parameters.remasking_strategy = "low_confidence_static"
    rollout = generate_rollouts(llada, [prompts[0]], parameters)
    with torch.no_grad():
        logits = llada(torch.cat([prompt, torch.full((4,), MASK)])[None]).logits[0, 8:]
    without = logits.clone()
    without[:, eos] = -torch.inf
    confidence = without.softmax(-1)
    confidence[:, MASK] = 0
    first = rollout.step_map[0] == 0
    assert first.nonzero()[:, 0].tolist() == sorted(confidence.max(-1).values.topk(2).indices.tolist())
    expected = logits.log_softmax(-1)[first].gather(-1, rollout.canvas_ids[0, first][:, None])[:, 0]
    torch.testing.assert_close(rollout.logprobs[0, first], expected, atol=1e-4, rtol=0)


def test_alg_temp_draws_positions_by_their_confidence(llada):
    confidence = torch.tensor([0.9, 0.5, 0.1, 0.7])
    count, temperature = 20000, 0.4
    masked = torch.ones(count, 4, dtype=torch.bool)
    points = torch.from_numpy(uniform(mix(1, 0, 0), np.arange(4 * count), 0, 1))
    values = confidence.log().repeat(count)
    scores = TokenScores(masked, values, values[:, None], lambda: points, temperature)
    one, two = torch.full((count,), 1), torch.full((count,), 2)
    chosen = SAMPLERS["low_confidence_static"](scores, masked, one).float().mean(0)
    weights = (confidence / temperature).softmax(-1)
    torch.testing.assert_close(chosen, weights, atol=0.012, rtol=0)
    pairs = SAMPLERS["low_confidence_static"](scores, masked, two).float().mean(0)
    without = weights / (1 - weights)  # drawn second, after another one
    expected = weights + weights * (without.sum() - without)
    torch.testing.assert_close(pairs, expected, atol=0.012, rtol=0)
    # in decoding: next to nothing changes nothing, much of it makes another order, another seed another one
    prompts = ragged_prompts((8, 5))
    for strategy in ("low_confidence_static", "margin", "entropy"):
        plain = generate_rollouts(llada, prompts, config(remasking_strategy=strategy), seed=1)
        cold = generate_rollouts(llada, prompts, config(remasking_strategy=strategy, alg_temp=1e-6), seed=1)
        assert_same(plain, cold)
        hot = [
            generate_rollouts(llada, prompts, config(remasking_strategy=strategy, alg_temp=9.0), seed=s)
            for s in (1, 2)
        ]
        assert not torch.equal(hot[0].step_map, plain.step_map) and not torch.equal(hot[0].step_map, hot[1].step_map)


def test_processors_criteria_and_streamers(model):
    prompt = ragged_prompts((6,))[0]
    seen = []

    class Streamer:
        def put(self, value):
            seen.append(("put", value.tolist()))

        def put_draft(self, value):
            seen.append(("draft", value.tolist()))

        def end(self):
            seen.append(("end", None))

    def only(ids, scores):
        assert ids[:, :6].tolist() == [prompt] * len(ids)
        kept = torch.full_like(scores, -torch.inf)
        kept[:, 9] = scores[:, 9]
        return kept

    stop = [lambda ids, scores: torch.tensor([ids.size(1) >= 6 + 8])]
    kwargs = {"logits_processor": [only], "stopping_criteria": stop, "streamer": Streamer()}
    output = model.generate(torch.tensor([prompt]), config(max_new_tokens=16), return_dict_in_generate=True, **kwargs)
    assert output.canvas_ids[0].tolist() == [9] * 8 + [MASK] * 8 and output.canvas_mask.sum() == 16
    assert output.sequences[0].tolist() == prompt + [9] * 8 + [PAD] * 8
    puts = [value for kind, value in seen if kind == "put"]
    assert puts == [[prompt], [[9] * 4], [[9] * 4]] and seen[-1][0] == "end"
    drafts = [value[0] for kind, value in seen if kind == "draft"]
    assert len(drafts) == output.num_forward_passes[0] and all(len(draft) == 4 for draft in drafts)


def test_family_defaults_and_published_settings():
    model = make_model("Dream").eval()

    def resolved(**kwargs):
        return model._resolve_generation_config(None, **kwargs)[0]

    defaults = resolved(max_new_tokens=16)
    assert (defaults.remasking_strategy, defaults.denoising_schedule) == ("entropy", "dream")
    assert (defaults.block_length, defaults.cache) == (None, "none")
    assert make_model("llada")._resolve_generation_config(None)[0].remasking_strategy == "low_confidence_static"

    published = {"_from_model_config": True, "alg": "topk_margin", "alg_temp": 0.3, "steps": 8, "eps": 1e-3}
    model.generation_config = DiffusionGenerationConfig.from_dict(published)
    config = resolved(max_new_tokens=16)
    assert (config.remasking_strategy, config.alg_temp, config.denoising_steps) == ("margin", 0.3, 8)
    assert resolved(max_new_tokens=16, block_length=4).denoising_steps == 2
    assert resolved(max_new_tokens=16, block_length=4, denoising_steps=3).denoising_steps == 3
    assert resolved(max_new_tokens=4).denoising_steps is None  # more steps than tokens: one token per step
    assert resolved(remasking_strategy="entropy").remasking_strategy == "entropy"
    again, _ = model._resolve_generation_config(config)
    assert again.to_dict() == config.to_dict()
    saved = model.generation_config.to_dict()
    assert {key: saved[key] for key in ("alg", "alg_temp", "steps", "eps")} == {
        key: published[key] for key in ("alg", "alg_temp", "steps", "eps")
    }
    for alg, ours in [("origin", "random"), ("maskgit_plus", "low_confidence_static"), ("entropy", "entropy")]:
        model.generation_config.alg = alg
        assert resolved().remasking_strategy == ours
    model.generation_config.alg = "new"
    with pytest.raises(ValueError, match="`alg` in generation_config.json must be one of"):
        resolved()
    assert resolved(remasking_strategy="margin").remasking_strategy == "margin"
    assert model.generate(torch.tensor([[7, 8]]), max_new_tokens=4, remasking_strategy="margin").shape == (1, 6)


def test_another_cache_than_the_checkpoints(llada):
    """The checkpoint's `refresh_interval` goes with its cache; one of the caller's own is refused with another."""
    prompt, saved = torch.tensor([[7, 8, 9]]), llada.generation_config
    llada.generation_config = DiffusionGenerationConfig(cache="prefix", refresh_interval=2)
    try:
        assert llada._resolve_generation_config(None)[0].refresh_interval == 2
        for cache in ("none", "dual"):
            config, _ = llada._resolve_generation_config(None, cache=cache)
            assert (config.cache, config.refresh_interval) == (cache, None)
            with pytest.raises(ValueError, match="`refresh_interval` says"):
                llada.generate(prompt, cache=cache, refresh_interval=2)
    finally:
        llada.generation_config = saved


def test_total_steps_per_block():
    assert denoising_steps_per_block(128, 128, 32) == 32
    assert denoising_steps_per_block(64, 128, 32) == 16
    assert denoising_steps_per_block(64, 128) == 64
    assert denoising_steps_per_block(8, 30, 8) == 2  # the last block is narrower
    for arguments, message in [
        ((10, 16, 4), "`total_steps` .10. must be a multiple of the number of blocks .4 .* pass 8 or 12"),
        ((32, 16, 4), "8 per block of 4 tokens.* pass at most 16"),
        ((0, 16, 4), "`total_steps` must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            denoising_steps_per_block(*arguments)


def test_what_does_not_go_together_is_refused(llada):
    for kwargs, message in [
        ({"cache": "dual", "refresh_interval": 4}, 'cache="prefix"'),
        ({"refresh_interval": -1, "cache": "prefix"}, "`refresh_interval` must be an integer of at least 0"),
        ({"cfg_scale": -1.0}, "`cfg_scale` must be at least 0"),
        ({"alg_temp": -0.1}, "`alg_temp` must be at least 0"),
        ({"suppress_eos": "yes"}, "`suppress_eos` must be `True` or `False`"),
        ({"cache": "window"}, "`cache` must be one of"),
        ({"further_horizon": 4}, "`refresh_interval`"),
        ({"dual_cache": True}, 'cache="dual"'),
        ({"cfg": 1.0}, "`cfg_scale`"),
    ]:
        with pytest.raises(ValueError, match=message):
            DiffusionGenerationConfig(**kwargs)
    prompt = torch.tensor([[7, 8, 9]])
    with pytest.raises(ValueError, match='`cache="exact"` is for block families'):
        llada.generate(prompt, cache="exact")
    sdar = make_model("sdar").eval()
    for kwargs in ({"cache": "dual"}, {"cfg_scale": 0.5}):
        with pytest.raises(ValueError, match="full-attention families"):
            sdar.generate(prompt, **kwargs)


def test_saved_and_loaded(tmp_path):
    values = {"cache": "prefix", "refresh_interval": 8, "cfg_scale": 0.5, "alg_temp": 0.1, "suppress_eos": True}
    DiffusionGenerationConfig(**values).save_pretrained(tmp_path)
    loaded = DiffusionGenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in values} == values


def test_horizon_of_nothing(model, monkeypatch):
    """The block alone is computed and nothing behind it is seen, which is not `cache="dual"`."""
    monkeypatch.setitem(CACHES, "horizon", {"refresh_interval": 0})
    parameters = config("horizon", remasking_strategy="low_confidence_static", cfg_scale=0.0, temperature=0.0)
    assert_is_its_definition(model, parameters, "horizon")
