import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_trl.generation import generate_rollouts

from ..trainers.tiny_rl import make_model
from .doors import NAN, NOT_COUNTS, NOT_NUMBERS, judge, options


pytestmark = pytest.mark.slow
FAMILIES = ["sdar", "Dream"]
GOOD = torch.tensor([[10, 11, 12, 13, 14]])
MODELS = {}


def model_of(family):
    if family not in MODELS:
        MODELS[family] = make_model(family).eval()
    return MODELS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family):
    model = model_of(family)

    def call(input_ids=GOOD, max_new_tokens=4, **bad):
        return model.generate(input_ids, max_new_tokens=max_new_tokens, **bad)

    vocabulary = model.config.vocab_size
    table = options(
        call,
        {
            "input_ids": [
                GOOD.float(), GOOD.double(), GOOD.bool(), GOOD[0], GOOD[None], GOOD[:, :0], GOOD[:0], GOOD - 11,
                GOOD.float() * NAN, GOOD + vocabulary, GOOD + 10**9, [], "text", 3, [[1.5]], GOOD.to(torch.complex64),
            ],
            "attention_mask": [
                torch.ones(1, 4), torch.ones(2, 5), torch.ones(1, 1, 5), torch.zeros(1, 5, dtype=torch.long),
                torch.tensor([[1, 0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 1, 0]]), torch.ones(5), "x",
                torch.tensor([[2, 2, 2, 2, 2]]), torch.tensor([[-1, 0, 1, 1, 1]]), torch.tensor([[NAN, 1, 1, 1, 1]]),
            ],
            "max_new_tokens": [-1, "4", 1.5, NAN, [4], 10**9],
            "num_return_sequences": [0, -1, 1.5, "2"],
            "block_length": NOT_COUNTS,
            "denoising_steps": NOT_COUNTS,
            "confidence_threshold": [-0.1, 1.1, *NOT_NUMBERS],
            "temperature": [-1.0, *NOT_NUMBERS],
            "mask_token_id": [10**6, vocabulary, -5, 1.5, "x"],
            "suppress_tokens": [[10**6], [-1], ["x"]],
            "eos_token_id": ["x", [1.5]],
            "seed": [1.5, "x", NAN],
            "entropy_bound": [-0.1, *NOT_NUMBERS],
            "threshold_lower": [-0.1, 0.95, *NOT_NUMBERS],
            "threshold_upper": [1.1, 0.5, *NOT_NUMBERS],
            "cfg_scale": [-1.0, *NOT_NUMBERS],
            "alg_temp": [-1.0, *NOT_NUMBERS],
            "top_k": [-1, 1.5, "x", NAN],
            "top_p": [-0.1, 1.1, *NOT_NUMBERS],
            "repetition_penalty": [0.0, -1.0, *NOT_NUMBERS],
            "generation_config": ["x", 3, {"nope": 1}],
            "remasking_strategy": ["nope", 3, []],
            "store_kv": [True],
            "cache": ["nope", "exact" if family == "Dream" else "dual"],
            "inputs_embeds": [torch.zeros(1, 5, 32)],
            "num_beams": [2],
            "streamer": [3],
            **{name: [1] for name in ("gen_length", "steps", "threshold", "alg", "temprature", "eos_early_stop")},
        },
        {"input_ids": "`input_ids`|Prompt 0|one token|integers", "attention_mask": "`attention_mask`|Prompt 0"},
    )  # fmt: skip
    judge(f"generate, {family}", table)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_rollouts(family):
    model = model_of(family)

    def call(prompts=((10, 11), (12,)), max_new_tokens=4, **bad):
        return generate_rollouts(model, prompts, max_new_tokens=max_new_tokens, **bad)

    vocabulary = model.config.vocab_size
    table = options(
        call,
        {
            "prompts": [
                [], None, "text", 3, [[]], [[10], []], [[-1]], [[vocabulary]], [[10**12]], [[1.5]], [["a"]], [[None]],
                [[[10]]], [10, 11], ["text"], [[10] * 500], {}, [[NAN]], [{}],
                [np.array([10.5])], [torch.tensor([10.0])], [np.array([True])], [torch.tensor([[10]])],
                [np.array(["a"])], GOOD, GOOD.numpy(), [[10, vocabulary]], [[True]],
            ],
            "max_new_tokens": [0, -1, 1.5, NAN, "4", [4], [4, 0], [4, 4, 4], [], 10**6, [4, "4"], [4, 1.5]],
            "num_generations": NOT_COUNTS,
            "num_slots": NOT_COUNTS,
            "seed": [1.5, "x", NAN, [1]],
            "index_offset": [-1, 1.5, "x", NAN],
            "record_entropies": [None, 1, "yes"],
            "generation_config": ["x", 3, {"nope": 1}],
        },
        {"prompts": "`prompts|Prompt [01] "},
    )  # fmt: skip
    judge(f"generate_rollouts, {family}", table)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(6, 50), min_size=1, max_size=9), st.sampled_from(["int32", "int16", "uint8"]))
def test_what_ids_are_stored_in_changes_nothing(family, ids, dtype):
    model = model_of(family)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    given_ids = torch.tensor([ids]).to(getattr(torch, dtype))
    assert torch.equal(model.generate(given_ids, max_new_tokens=5, do_sample=False), expected)
    rollouts = [
        generate_rollouts(model, [kind(ids)], max_new_tokens=5, seed=0).completion_ids
        for kind in (list, tuple, lambda x: np.array(x, dtype=dtype), lambda x: torch.tensor(x).to(given_ids.dtype))
    ]
    assert all(torch.equal(rollout, rollouts[0]) for rollout in rollouts)
