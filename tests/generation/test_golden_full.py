"""
Greedy decodings of the public code of Dream, LLaDA and MMaDA, token for token, step for step and, where a cache is
used, with the same tokens computed in every forward. What that code does and ours has no name for is reproduced here,
by a function in place of a strategy or by a stopping criterion, and named in `QUIRKS`.

Not here: `t2i` decodes image codes, with a schedule, a vocabulary and a layout of its own.
"""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dllm_trl  # noqa: F401
from dllm_trl.generation import DiffusionGenerationConfig, denoising_steps_per_block
from dllm_trl.generation.engine import decode
from dllm_trl.generation.forward import StockForward
from dllm_trl.generation.fused_forward import FusedForward
from dllm_trl.generation.samplers import make_sampler, top_quota
from dllm_trl.generation.samplers import parameters as strategy_parameters


GOLDEN = Path(os.environ.get("DLLM_TRL_GOLDEN", Path(__file__).parents[1] / "fixtures" / "golden"))
FAMILIES = ["dream", "llada", "mmada"]
OURS = {
    "maskgit_plus": "low_confidence_static",
    "topk_margin": "margin",
    "entropy": "entropy",
    "low_confidence": "low_confidence_static",
    "confidence": "low_confidence_static",
    "margin_confidence": "margin",
    "neg_entropy": "entropy",
}


def is_image_decoding(case):
    return case["name"].startswith("t2i")


def cases():
    for family in FAMILIES:
        for case in json.loads((GOLDEN / family / "golden_generate.json").read_text())["cases"]:
            if not is_image_decoding(case):
                yield pytest.param(family, case, id=f"{family}/{case['name']}")


@pytest.fixture(scope="module")
def models():
    return {name: AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32) for name in FAMILIES}


# ---------------------------------------------------------------------------------------------------------- quirks


def most_uncertain_first(scores, masked, quota, **kwargs):
    """dLLM-RL's llada_sample.py: `neg_entropy` is the entropy, so that the most uncertain positions come first."""
    return top_quota(scores.entropy, masked, quota)


def uncertain_above(threshold):
    """The same with a threshold, which then is one on the entropy in nats."""

    def sampler(scores, masked, quota, **kwargs):
        selected = masked & (scores.entropy >= threshold)
        return torch.where(selected.any(-1, keepdim=True), selected, top_quota(scores.entropy, masked, quota))

    return sampler


def above(score_name, threshold):
    """dLLM-RL compares whatever it ranks by (margin, negative entropy) with the threshold."""

    def sampler(scores, masked, quota, **kwargs):
        score = -scores.entropy if score_name == "entropy" else getattr(scores, score_name)
        selected = masked & (score >= threshold)
        return torch.where(selected.any(-1, keepdim=True), selected, top_quota(score, masked, torch.ones_like(quota)))

    return sampler


def first_token_first(sampler):
    """dLLM-RL's dream_sample.py without a cache: the first forward of a block commits its first token, no other."""

    def wrapped(scores, masked, quota, **kwargs):
        commit = sampler(scores, masked, quota)
        fresh = masked.all(-1, keepdim=True)
        return torch.where(fresh, torch.arange(masked.size(1)) == 0, commit)

    return wrapped


def origin_with(draws, steps, eps):
    """Dream's `origin` commits every masked token with probability 1 - s / t; ours commits as many as the schedule
    says. The draws are those of the public code."""
    draws, times, step = iter(draws), torch.linspace(1, eps, steps + 1), iter(range(steps))

    def sampler(scores, masked, quota, **kwargs):
        i = next(step)
        share = 1 - times[i + 1] / times[i] if i < steps - 1 else 1
        return masked.clone().masked_scatter_(masked, torch.tensor(next(draws)).flatten() < share)

    return sampler


def deferring(tokens, steps, threshold):
    """Fast-dLLM's generation_utils.py: of each step's quota only tokens above the threshold (and the best one) are
    committed, and the others are added to the next step's quota; steps are added until nothing is left."""
    state = {"step": 0, "deferred": 0}

    def sampler(scores, masked, quota, **kwargs):
        share = tokens // steps if state["step"] < steps else 0
        chosen = top_quota(scores.confidence, masked, torch.tensor([share + state["deferred"]]))
        commit = chosen & (scores.confidence >= threshold) | top_quota(scores.confidence, masked, torch.tensor([1]))
        state["step"] += 1
        state["deferred"] = int((chosen & ~commit).sum())
        return commit

    return sampler


def without_confidence(ids):
    """LLaDA's `confidence_eos_eot_inf`: EOS and EoT leave the softmax that confidence is from (both do at temperature
    0, where the chained assignment meets one tensor under two names), so that as tokens they have confidence 0."""

    def sampler(scores, masked, quota, **kwargs):
        rest = scores.log_probs.index_fill(-1, torch.tensor(ids), -torch.inf).logsumexp(-1)
        either = (scores.token_log_probs[:, None] == scores.log_probs[:, ids]).any(-1)
        confidence = (scores.token_log_probs - rest).exp().masked_fill(either, 0)
        return top_quota(torch.zeros(masked.shape).masked_scatter_(masked, confidence), masked, quota)

    return sampler


def last_token_is(eot):
    """MMaDA's `mmu_generate_fast` ends a row only where the last token of a block is the end of the turn."""
    return lambda ids, scores: ids[:, -1] == eot


# ------------------------------------------------------------------------------------------------- names to ours


def parameters(family, case):
    """Ours for a case of the public code: the config, and stopping criteria."""
    kwargs, upstream = case["kwargs"], case["upstream"]
    length = next(kwargs[k] for k in ("gen_length", "max_new_tokens", "max_gen_length") if k in kwargs)
    block = kwargs.get("block_length", kwargs.get("block_size")) or length
    threshold = kwargs.get("threshold", kwargs.get("unmask_threshold"))
    target = kwargs.get("alg", kwargs.get("remasking", kwargs.get("target")))
    values = {
        "max_new_tokens": length,
        "block_length": block,
        "denoising_schedule": "dream" if family == "dream" else "even",
        "do_sample": False,
        "eos_token_id": -1,
        "suppress_tokens": [],
        "cfg_scale": kwargs.get("cfg_scale", 0.0),
        "alg_temp": kwargs.get("alg_temp") or 0.0,
        "cache": "none",
    }
    if "dual_cache" in kwargs or "generate_with" in upstream and "fast_dllm" in case["name"]:
        values["cache"] = "dual" if kwargs.get("dual_cache", "dual_cache" in upstream) else "prefix"
    if kwargs.get("use_cache"):
        values |= {"cache": "prefix", "refresh_interval": kwargs["further_horizon"]}
    if threshold is not None:  # one token at least, whatever `steps` says
        values |= {"confidence_threshold": threshold, "denoising_schedule": "even", "denoising_steps": block}
        values["remasking_strategy"] = "low_confidence_dynamic"
        if target in ("margin_confidence", "neg_entropy"):
            values["remasking_strategy"] = above({"margin_confidence": "margin"}.get(target, "entropy"), threshold)
    else:
        values["remasking_strategy"] = OURS.get(target, target)
        values["denoising_steps"] = denoising_steps_per_block(kwargs["steps"], length, block)
    stopping = []
    # quirks, from here on
    if target == "origin":
        values["remasking_strategy"] = origin_with(case["torch_rand_draws"], kwargs["steps"], kwargs["eps"])
    if target == "neg_entropy" and family != "dream":
        values["remasking_strategy"] = most_uncertain_first if threshold is None else uncertain_above(threshold)
    if "no_cache" in case["name"] and target == "confidence_threshold":
        values["remasking_strategy"] = deferring(length, kwargs["steps"], threshold)
    if "dream_sample" in upstream and values["cache"] == "none":
        sampler = values["remasking_strategy"]
        defaults = {name: field.default for name, field in strategy_parameters().items()}
        values["remasking_strategy"] = first_token_first(make_sampler(sampler, defaults | values))
    if kwargs.get("confidence_eos_eot_inf"):
        values["remasking_strategy"] = without_confidence([case["eos_token_id"], case["eot_token_id"]])
    if kwargs.get("logits_eos_inf"):
        values |= {"suppress_eos": True, "eos_token_id": case["eos_token_id"]}
    if "eot_token" in kwargs:
        stopping = [last_token_is(kwargs["eot_token"])]
    return DiffusionGenerationConfig(**{k: v for k, v in values.items() if v is not None}), stopping


def forwards_of(case, row, block):
    """1-based numbers of the public code's forwards that row `row` used, in order."""
    width = len(case["prompt_ids"][0])
    steps = torch.tensor(case.get("unmask_forward", case.get("unmask_step")))[:, width:]
    cached = any(name in case["upstream"] for name in ("_sample.py", "utils_block", "_cache"))
    used, first = [], 1
    for start in range(0, steps.size(1), block):
        here = steps[:, start : start + block]
        if not here.all():  # never decoded
            break
        used += range(first, int(here[row].max()) + 1)
        # these loops compute a second forward before they look whether the first one has filled the block
        wasted = cached and int(here.max()) == first
        first = int(here.max()) + 1 + wasted
    assert first - 1 == case["forwards"]
    return used


def decode_case(model, family, case, rows, fused, monkeypatch):
    """A rollout of some of the prompts, and how many tokens each of its forwards computed of a row."""
    config, stopping = parameters(family, case)
    settings = model._decoding_settings(model._resolve_generation_config(config)[0], stopping_criteria=stopping)
    masks = case.get("attention_mask") or [[1] * len(row) for row in case["prompt_ids"]]
    prompts = [torch.tensor(case["prompt_ids"][i])[torch.tensor(masks[i]).bool()].numpy() for i in rows]
    widths = []
    for cls in (StockForward, FusedForward):

        def recorded(self, units, *args, step=cls.step):
            widths.append(units.ids.size(1))
            return step(self, units, *args)

        monkeypatch.setattr(cls, "step", recorded)
    rollout = decode(model, prompts, [config.max_new_tokens] * len(prompts), settings, fused=fused)
    monkeypatch.undo()
    return rollout, widths, config.block_length


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
@pytest.mark.parametrize("family, case", list(cases()))
def test_decoding_matches_the_public_code(models, family, case, fused, monkeypatch):
    width, count = len(case["prompt_ids"][0]), len(case["prompt_ids"])
    together, _, _ = decode_case(models[family], family, case, range(count), fused, monkeypatch)
    for row in range(count):
        rollout, widths, block = decode_case(models[family], family, case, [row], fused, monkeypatch)
        assert rollout.canvas_ids[0].tolist() == together.canvas_ids[row].tolist() == case["output_ids"][row][width:]
        # ours counts the forwards that commit something, the public code all of them
        upstream = case.get("unmask_forward", case.get("unmask_step"))[row][width:]
        order = {step: i for i, step in enumerate(sorted({step for step in upstream if step}))}
        assert rollout.step_map[0].tolist() == [order.get(step, -1) for step in upstream]
        used = forwards_of(case, row, block)
        assert rollout.num_forward_passes.tolist() == [len(used)] == [together.num_forward_passes[row]]
        if "forward_lengths" in case:
            assert widths == [case["forward_lengths"][number - 1] for number in used]


def test_a_corrupted_number_is_noticed(models, monkeypatch):
    family, case = copy.deepcopy(next(cases()).values)
    case["output_ids"][0][-1] += 1
    with pytest.raises(AssertionError):
        test_decoding_matches_the_public_code(models, family, case, True, monkeypatch)
