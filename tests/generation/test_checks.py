"""Bad arguments at the entry points: each error names the argument and says how to mend it."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from dllm_trl.generation.configuration import DIFFERENT, METHODS, OWN, RENAMED
from dllm_trl.trainers import DiffusionGRPOConfig, DiffusionSFTConfig
from tests.trainers.tiny_rl import TINY, make_model, make_tokenizer

from .conftest import tiny_model


IDS = torch.tensor([[10, 11, 12, 13, 14]])
NAN = float("nan")


@pytest.fixture(scope="module", params=["sdar", "llada"])
def model(request):
    return tiny_model(request.param)


BAD_ROLLOUTS = [
    *[({"prompts": value}, "`prompts`") for value in (None, 5, "text", [], {"input_ids": [[1]]}, iter([[1]]), {1})],
    *[({"prompts": value}, "`prompts`") for value in (IDS, IDS.numpy(), IDS[0], [1, 2], ([1][0],))],
    *[
        ({"prompts": [[3], value]}, r"`prompts\[1\]`")
        for value in ("text", None, 1.5, {"a": 1}, [[1]], [1, [2]], ["a"])
    ],
    *[({"prompts": [[3], value]}, r"`prompts\[1\]`") for value in ([None], [1.5], [NAN], [True], [10**30], IDS)],
    ({"prompts": [[3], []]}, "Prompt 1 is empty"),
    ({"prompts": [[3], [5] * 300]}, "Prompt 1 has 300 tokens and `max_new_tokens` is 4"),
    *[({"num_generations": value}, "`num_generations` must be") for value in (0, -1, 1.5, "2", None, True, NAN)],
    ({"num_generations": 2}, r"`num_generations` \(2\) > 1 needs sampling.*all the same"),
    *[({"max_new_tokens": value}, "`max_new_tokens` must be") for value in (0, -1, 1.5, "8", True, NAN, {}, [3], [])],
    *[({"max_new_tokens": [3, value]}, r"`max_new_tokens\[1\]` must be") for value in (0, -1, 1.5, "8", True, None)],
    *[({"num_slots": value}, "`num_slots` must be") for value in (0, -1, 1.5, "4", True, NAN)],
    *[({"seed": value}, "`seed` must be") for value in (-1, 1.5, "a", True, NAN)],
    *[({"index_offset": value}, "`index_offset` must be") for value in (-1, 1.5, "0", None, NAN)],
    *[({"fused": value}, "`fused` must be") for value in ("yes", 1, 0)],
    *[
        ({"generation_config": value}, "`generation_config` must be")
        for value in ({"seed": 1}, "greedy", 4, DiffusionGRPOConfig)
    ],
    ({"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)}, "here it is `num_generations`"),
    *[
        ({"model": value}, "`model` must be a diffusion language model")
        for value in (None, "path", 3, LlamaForCausalLM)
    ],
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROLLOUTS)
def test_arguments_of_rollouts(model, bad, message):
    with pytest.raises(ValueError, match=message):
        generate_rollouts(**{"model": model, "prompts": [[3], [5, 6]], "max_new_tokens": 4, **bad})


def test_models_of_rollouts(model):
    stock = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    for other, message in [
        (stock, "from_pretrained"),
        (model.model, "head"),
        (torch.nn.DataParallel(model), "unwrap_model"),
    ]:
        with pytest.raises(ValueError, match=f"`model` must be a diffusion language model.*{message}"):
            generate_rollouts(other, [[3]])


def test_kinds_of_good_arguments(model):
    expected = generate_rollouts(model, [[3], [5, 6]], max_new_tokens=[3, 4], seed=1).completion_ids
    for prompts in ([np.array([3]), np.array([5, 6])], [torch.tensor([3]), (5, 6)], ([3], [np.int32(5), 6])):
        for limits in (np.array([3, 4]), torch.tensor([3, 4]), (np.int64(3), 4)):
            rollout = generate_rollouts(model, prompts, max_new_tokens=limits, seed=np.int64(1), num_slots=np.int64(1))
            assert torch.equal(rollout.completion_ids, expected)


@pytest.mark.parametrize("family", TINY)
def test_a_tokenizers_output_is_a_prompt(family):
    model, encoding = make_model(family).eval(), make_tokenizer()(["12+3", "4"], return_tensors="pt", padding=True)
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**encoding, **kwargs)
    for given in (encoding, dict(encoding)):
        assert torch.equal(model.generate(given, **kwargs), expected)
        assert torch.equal(model.generate(input_ids=given, **kwargs), expected)


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        ([[1, 2]], {}, r"`input_ids` must be a tensor.*`return_tensors=\"pt\"`"),
        (IDS.numpy(), {}, "`input_ids` must be a tensor"),
        ("text", {}, "`input_ids` must be a tensor"),
        ({"input_ids": [[1, 2]]}, {}, "`input_ids` must be a tensor"),
        ({"labels": IDS}, {}, r"`input_ids` must be.* a dict of \['labels'\]"),
        (IDS[0], {}, r"shape \(batch, prompt length\), but has \(5,\); pass `input_ids\[None\]`"),
        (IDS[None], {}, r"shape \(batch, prompt length\), but has \(1, 1, 5\)"),
        (IDS[:0], {}, "`input_ids` holds no prompt"),
        (IDS, {"attention_mask": [[1] * 5]}, "`attention_mask` must be a tensor"),
        (IDS, {"attention_mask": torch.ones(1, 5, 5)}, r"`attention_mask` must have the shape .*but has \(1, 5, 5\)"),
        (IDS, {"num_return_sequences": 0}, "`num_return_sequences` must be an integer of at least 1, but is 0"),
        (IDS, {"num_return_sequences": 2, "do_sample": False}, "`num_return_sequences`.*needs sampling"),
        (IDS, {"generation_config": {"seed": 1}}, "`generation_config` must be a `DiffusionGenerationConfig`"),
        (IDS, {"seed": "a"}, "`seed` must be an integer"),
    ],
)
def test_arguments_of_generate(model, inputs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.generate(inputs, **{"max_new_tokens": 4, **kwargs})


@pytest.mark.parametrize("name", [*RENAMED, *DIFFERENT])
def test_published_names_have_a_hint(model, name):
    hint = RENAMED.get(name) or DIFFERENT[name]
    with pytest.raises(ValueError) as error:
        model.generate(IDS, **{name: 2})
    assert f"`{name}` is not an argument here" in str(error.value) and hint in str(error.value)
    with pytest.raises(ValueError, match=f"`{name}` is not an argument here"):
        DiffusionGenerationConfig(**{name: 2})


def test_no_name_of_ours_counts_as_a_published_one():
    ours = {*OWN, *(field.name for kind in (DiffusionGRPOConfig, DiffusionSFTConfig) for field in fields(kind))}
    assert not ours & {*RENAMED, *DIFFERENT} and not RENAMED.keys() & DIFFERENT.keys()
    # What is named is there: an argument of `generate`, of stock transformers or of ours
    known = {"input_ids", "logits_processor", *vars(DiffusionGenerationConfig())}
    assert set(RENAMED.values()) <= known


@pytest.mark.parametrize("name", METHODS)
def test_published_methods_have_a_hint(model, name):
    with pytest.raises(AttributeError, match=f"`{name}` is a method of the published code; use `model.generate`"):
        getattr(model, name)
    assert not hasattr(model, name) and not hasattr(model, "nothing")


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"store_kv": True}, "`store_kv` is an argument of the published code.*`past_key_values` are always extended"),
        ({"block_size": 4}, "`block_size`.*use `block_length`"),
        ({"attention_mask": torch.ones(1, 5, 5)}, r"`attention_mask` must have shape .* but has \(1, 5, 5\)"),
        ({"attention_mask": torch.ones(5)}, r"`attention_mask` must have shape .* but has \(5,\)"),
    ],
)
def test_arguments_of_a_forward(family, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(family)(IDS, **kwargs)
