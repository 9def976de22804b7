"""Greedy decodings of the public code on tiny published-format checkpoints, token for token and step for step."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dllm_trl  # noqa: F401
from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts


GOLDEN = Path(os.environ.get("DLLM_TRL_GOLDEN", Path(__file__).parents[1] / "fixtures" / "golden"))
FAMILIES = ["sdar", "sdar_moe"]
# generate.py takes the confidence from the FILTERED distribution: with top_k=1 it is always exactly 1, so its dynamic
# strategy commits whole blocks. Ours is of the whole vocabulary (DESIGN §3); threshold 0 reproduces what upstream
# does.
QUIRKS = {"topk1/low_confidence_dynamic/p8/b4s4": {"confidence_threshold": 0.0}}


def cases():
    for family in FAMILIES:
        for case in json.loads((GOLDEN / family / "golden_generate.json").read_text())["cases"]:
            yield pytest.param(family, case, id=f"{family}/{case['name']}")


@pytest.fixture(scope="module")
def models():
    return {name: AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32) for name in FAMILIES}


def parameters(case) -> DiffusionGenerationConfig:
    kwargs = case["kwargs"]
    threshold = kwargs.get("confidence_threshold", kwargs.get("threshold"))
    dynamic = "low_confidence_static" if threshold >= 1 else "low_confidence_dynamic"
    values = {
        "block_length": kwargs["block_length"],
        "denoising_steps": kwargs["denoising_steps"],
        "remasking_strategy": kwargs.get("remasking_strategy", dynamic),
        "confidence_threshold": threshold,
        "do_sample": False,
        "eos_token_id": kwargs["stopping_criteria_idx"] or -1,
        "max_new_tokens": len(case["output_ids"][0]) - len(case["prompt_ids"][0]),
    }
    return DiffusionGenerationConfig(**{**values, **QUIRKS.get(case["name"], {})})


def decode(model, case, fused):
    """Ids, 1-based unmask step within the block, denoising forwards per block."""
    prompt, config = case["prompt_ids"][0], parameters(case)
    rollout = generate_rollouts(model, [prompt], config, fused=fused)
    blocks = (torch.arange(rollout.canvas_ids.size(1)) + len(prompt)) // config.block_length
    steps = rollout.step_map[0]
    first = torch.tensor([steps[blocks == block].min() for block in blocks])
    forwards = [len(steps[blocks == block].unique()) for block in blocks.unique()]
    return prompt + rollout.canvas_ids[0].tolist(), [0] * len(prompt) + (steps - first + 1).tolist(), forwards


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
@pytest.mark.parametrize("family, case", list(cases()))
def test_decoding_matches_the_public_code(models, family, case, fused):
    ids, steps, forwards = decode(models[family], case, fused)
    assert ids == case["output_ids"][0]
    assert steps == case["unmask_step"][0]
    # whole blocks that were revealed from the start cost upstream no forward, and us none either
    assert forwards == [n for n in case["denoise_forwards_per_block"] if n]


def test_a_corrupted_number_is_noticed(models):
    case = copy.deepcopy(next(cases()).values[1])
    case["output_ids"][0][-1] += 1
    with pytest.raises(AssertionError):
        test_decoding_matches_the_public_code(models, "sdar", case, True)


def test_the_quirk_is_upstreams(models):
    """Without the quirk's threshold the case decodes in more steps, so the entry above is not dead."""
    case = next(p.values[1] for p in cases() if p.values[1]["name"] in QUIRKS)
    prompt = case["prompt_ids"][0]
    config = parameters(case)
    config.confidence_threshold = case["kwargs"]["confidence_threshold"]
    rollout = generate_rollouts(models["sdar"], [prompt], config)
    assert rollout.num_forward_passes.item() > sum(case["denoise_forwards_per_block"])
