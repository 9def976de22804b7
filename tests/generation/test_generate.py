"""`model.generate` and `DiffusionGenerationConfig` as a user of transformers expects them."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from dllm_trl.generation import DiffusionGenerateOutput, DiffusionGenerationConfig
from dllm_trl.generation.samplers import SAMPLERS

from .conftest import PAD, left_pad, ragged_prompts, tiny_model


PROMPT = torch.tensor([[5, 9, 2, 7, 11]])


def response(model, **kwargs):
    kwargs.setdefault("max_new_tokens", 8)
    return model.generate(PROMPT, **kwargs)[0, PROMPT.size(1) :].tolist()


def test_returns_prompt_and_response(sdar):
    output = sdar.generate(PROMPT, max_new_tokens=6)
    assert output.dtype == torch.long and output.shape == (1, 11)
    assert torch.equal(output[:, :5], PROMPT)
    named = sdar.generate(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=6)
    assert torch.equal(output, named)
    full = sdar.generate(PROMPT, max_length=11, return_dict_in_generate=True)
    assert isinstance(full, DiffusionGenerateOutput) and torch.equal(full.sequences, output)
    assert full.canvas_ids.shape == full.canvas_mask.shape == full.step_map.shape == full.logprobs.shape == (1, 6)
    assert full.tokens_per_forward == 6 / full.num_forward_passes.item()
    assert full.logprobs.dtype == torch.float32


def test_rows_that_end_early_are_padded(sdar):
    batch = left_pad(ragged_prompts())
    free = sdar.generate(**batch, max_new_tokens=12, do_sample=True, seed=0)
    eos = free[0, batch["input_ids"].size(1) + 1].item()
    kwargs = {"max_new_tokens": 12, "do_sample": True, "seed": 0, "eos_token_id": eos, "pad_token_id": PAD}
    output = sdar.generate(**batch, **kwargs, return_dict_in_generate=True)
    width = batch["input_ids"].size(1)
    for row, sequence in enumerate(output.sequences):
        answer = sequence[width:].tolist()
        if eos in answer:
            end = answer.index(eos) + 1
            assert set(answer[end:]) <= {PAD}
            assert output.canvas_mask[row].sum() >= end
        assert answer[0] == free[row, width]
    assert eos in output.sequences[0, width:]


def test_do_sample_and_temperature(sdar):
    greedy = response(sdar)
    sampled = response(sdar, do_sample=True, temperature=1.3, seed=4)
    assert sampled != greedy
    assert response(sdar, temperature=1.3, seed=4) == sampled  # an explicit temperature samples
    assert response(sdar, temperature=0) == greedy
    assert response(sdar, temperature=0.0, do_sample=True) == greedy
    assert response(sdar, temperature=1.3, do_sample=False) == greedy
    assert response(sdar, do_sample=True, top_k=1) == greedy
    torch.manual_seed(3)
    first = response(sdar, do_sample=True)
    torch.manual_seed(3)
    assert response(sdar, do_sample=True) == first  # `seed=None` draws one from torch's default generator


def test_priority_of_the_sources():
    model = tiny_model()
    model.generation_config = DiffusionGenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=20,
        block_length=2,
        max_new_tokens=3,
        eos_token_id=[9, 8],
        pad_token_id=1,
    )
    resolve = model._resolve_generation_config
    config, unused = resolve(None)
    assert (config.do_sample, config.temperature, config.top_k, config.block_length) == (True, 0.6, 20, 2)
    assert (config.denoising_steps, config.max_new_tokens, config.eos_token_id) == (2, 3, [9, 8])
    assert (config.remasking_strategy, config.top_p, unused) == ("low_confidence_dynamic", 1.0, {})
    passed = GenerationConfig(temperature=0.3, max_new_tokens=5)
    config, unused = resolve(passed, temperature=0.2, block_length=8, typo=1)
    assert (config.temperature, config.max_new_tokens, config.block_length, unused) == (0.2, 5, 8, {"typo": 1})
    assert resolve(passed)[0].temperature == 0.3 and resolve(passed)[0].do_sample
    assert not resolve(DiffusionGenerationConfig(do_sample=False))[0].do_sample
    config, _ = resolve(None, max_length=40)  # a length given at the call replaces the other kind of length
    assert config.max_new_tokens is None and config.max_length == 40
    bare = tiny_model()
    config, _ = bare._resolve_generation_config(None)
    assert (config.block_length, config.denoising_steps, config.do_sample) == (4, 4, False)
    assert config.mask_token_id == bare.config.mask_token_id and config.max_new_tokens == 256


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"confidence_treshold": 0.9}, r"unknown arguments \['confidence_treshold'\]"),
        ({"block_size": 4}, "use `block_length`"),
        ({"gen_length": 4}, "use `max_new_tokens`"),
        ({"steps": 4}, "use `denoising_steps"),
        ({"alg": "entropy"}, "use `remasking_strategy`"),
        ({"threshold": 0.9}, "use `confidence_threshold`"),
        ({"mask_id": 3}, "use `mask_token_id`"),
        ({"denoising_steps": 0}, "`denoising_steps` must be an integer of at least 1"),
        ({"block_length": 0}, "`block_length` must be an integer of at least 1"),
        ({"block_length": 2.5}, "`block_length` must be an integer"),
        ({"remasking_strategy": "confident"}, "`remasking_strategy` must be one of"),
        ({"confidence_threshold": 1.5}, "`confidence_threshold` is a probability"),
        ({"entropy_bound": -1}, "`entropy_bound` must be at least 0"),
        ({"denoising_schedule": "cosine"}, "`denoising_schedule` must be one of"),
        ({"temperature": -1}, "`temperature` must be at least 0"),
        ({"top_k": -5}, "`top_k`"),
        ({"top_p": 1.2}, "`top_p` must lie"),
        ({"cache": "dual"}, "exact cache"),
        ({"num_beams": 2}, "Beam search"),
        ({"assistant_model": object()}, "`assistant_model` is not supported"),
        ({"inputs_embeds": torch.zeros(1, 2, 3)}, "`inputs_embeds` is not supported"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1000}, "context of 256"),
        ({"max_length": 4, "max_new_tokens": None}, "leaves no room"),
        ({"num_return_sequences": 2}, "needs sampling"),
        ({"stop_strings": ["x"]}, "pass `tokenizer=`"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}, "left-padded"),
        ({"attention_mask": torch.ones(1, 3)}, "shape of `input_ids`"),
    ],
)
def test_bad_input_is_named(sdar, kwargs, message):
    with pytest.raises(ValueError, match=message):
        sdar.generate(PROMPT, **{"max_new_tokens": 4, **kwargs})


def test_prompts_are_checked(sdar):
    with pytest.raises(ValueError, match="`input_ids` is required"):
        sdar.generate()
    with pytest.raises(ValueError, match="shape"):
        sdar.generate(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="Prompt 0 is empty"):
        sdar.generate(torch.tensor([[0, 0]]), attention_mask=torch.zeros(1, 2, dtype=torch.long))
    config = DiffusionGenerationConfig(max_new_tokens=4)
    model = tiny_model()
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="no `mask_token_id`"):
        model.generate(PROMPT, generation_config=config)


def test_num_return_sequences(sdar):
    prompts = left_pad(ragged_prompts((4, 6)))
    output = sdar.generate(**prompts, num_return_sequences=3, do_sample=True, max_new_tokens=9, seed=1)
    assert output.shape == (6, 15)
    assert torch.equal(output[:, :6], prompts["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in output[:3].tolist()}) == 3


def test_eos_can_be_switched_off(sdar):
    eos = response(sdar)[1]
    assert len(response(sdar, eos_token_id=eos)) < 8
    model = tiny_model()
    model.generation_config.eos_token_id = eos
    assert len(response(model)) < 8
    assert len(response(model, eos_token_id=-1)) == 8


def test_logits_processors_see_the_row_and_act(sdar):
    seen = []

    class Ban(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((input_ids.shape, scores.shape))
            assert torch.equal(input_ids[0, :5], PROMPT[0])
            scores[:, banned] = -torch.inf
            return scores

    banned = response(sdar)[0]
    result = response(sdar, logits_processor=LogitsProcessorList([Ban()]))
    assert banned not in result
    assert seen[0] == ((3, 5), (3, 64))  # three masked positions in the first block, the prompt only
    batch = left_pad(ragged_prompts((5, 2)))
    batch["input_ids"][0] = PROMPT[0]
    calls = []

    class Count(LogitsProcessor):
        def __call__(self, input_ids, scores):
            calls.append(input_ids[0].tolist())
            return scores

    plain = sdar.generate(**batch, max_new_tokens=4)
    assert torch.equal(plain, sdar.generate(**batch, max_new_tokens=4, logits_processor=[Count()]))
    assert PROMPT[0].tolist() in calls[:2] and sorted(map(len, calls[:2])) == [2, 5]  # padding never shows
    penalised = response(sdar, repetition_penalty=50.0)
    assert len(set(penalised)) > len(set(response(sdar, repetition_penalty=1.0))) or len(set(penalised)) == 8


def test_stopping_criteria_act_at_the_end_of_a_block(sdar):
    class AfterSix(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.size(1) >= 6])

    stopped = response(sdar, max_new_tokens=20, stopping_criteria=StoppingCriteriaList([AfterSix()]))
    assert stopped == response(sdar, max_new_tokens=20)[:3]  # the prompt's block ends at 8 = 5 + 3


def test_streamer_gets_drafts_and_blocks(sdar):
    events = []

    class Streamer:
        def put(self, value):
            events.append(("put", value.tolist()))

        def put_draft(self, value):
            events.append(("draft", value.tolist()))

        def end(self):
            events.append(("end", None))

    output = sdar.generate(PROMPT, max_new_tokens=7, streamer=Streamer(), return_dict_in_generate=True)
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "put" and kinds[-1] == "end" and events[0][1] == PROMPT.tolist()
    finished = sum((value[0] for kind, value in events[1:] if kind == "put"), [])
    assert finished == output.sequences[0, 5:].tolist()
    assert kinds.count("draft") == output.num_forward_passes.item()
    first = events[1][1][0]  # the block's head is the prompt's last token, which is not part of the draft
    assert len(first) == 3 and sdar.config.mask_token_id in first
    with pytest.raises(ValueError, match="one prompt"):
        sdar.generate(PROMPT.repeat(2, 1), streamer=Streamer())


def test_a_function_is_taken_where_a_name_is(sdar):
    expected = response(sdar, remasking_strategy="sequential")
    assert response(sdar, remasking_strategy=SAMPLERS["sequential"]) == expected

    def mine(scores, masked, quota, **kwargs):
        return SAMPLERS["sequential"](scores, masked, quota, **kwargs)

    assert response(sdar, generation_config=DiffusionGenerationConfig(remasking_strategy=mine)) == expected


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (lambda scores, masked, quota, **kwargs: masked & False, "commits nothing .* would never be full"),
        (lambda scores, masked, quota, **kwargs: ~masked | True, "True at masked positions only"),
        (lambda scores, masked, quota, **kwargs: masked.float(), "must return a boolean tensor"),
        (lambda scores, masked, quota, **kwargs: masked[:, :1], "of shape .1, 4. that"),
    ],
)
def test_a_function_that_breaks_the_contract_is_named(sdar, strategy, message):
    with pytest.raises(ValueError, match="`remasking_strategy`.*" + message):
        response(sdar, remasking_strategy=strategy)


def test_config_saves_and_loads(tmp_path):
    config = DiffusionGenerationConfig(
        block_length=8,
        denoising_steps=3,
        confidence_threshold=0.7,
        temperature=0.5,
        max_new_tokens=20,
        eos_token_id=[1],
    )
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["block_length"] == 8 and saved["denoising_steps"] == 3
    assert None not in saved.values()
    loaded = DiffusionGenerationConfig.from_pretrained(tmp_path)
    assert loaded == config
    with pytest.raises(ValueError, match="`denoising_steps`"):
        DiffusionGenerationConfig(denoising_steps=0)
    with pytest.raises(ValueError, match="use `block_length`"):
        DiffusionGenerationConfig(block_size=4)
    with pytest.raises(ValueError, match=r"unknown arguments \['confidence_treshold'\]"):
        DiffusionGenerationConfig(confidence_treshold=0.9)
    loaded, unused = DiffusionGenerationConfig.from_pretrained(tmp_path, seed=3, other=4, return_unused_kwargs=True)
    assert loaded.seed == 3 and unused["other"] == 4


def test_a_published_generation_config_survives(tmp_path):
    """Foreign keys and `_from_model_config: true` (Dream's file has it) neither raise nor get lost."""
    published = {"_from_model_config": True, "alg": "origin", "steps": 512, "temperature": 0.0, "my_key": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(published))
    config = DiffusionGenerationConfig.from_pretrained(tmp_path)
    assert (config.alg, config.steps, config.my_key, config.temperature) == ("origin", 512, 3, 0.0)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["alg"] == "origin" and saved["steps"] == 512


def test_the_checkpoints_parameters_are_used(tmp_path):
    model = tiny_model()
    model.generation_config.block_length = 2
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.generation_config, DiffusionGenerationConfig)
    output = loaded.generate(PROMPT, return_dict_in_generate=True)
    assert output.canvas_ids.shape == (1, 5)
    expected = model.generate(PROMPT, block_length=2, max_new_tokens=5)
    assert torch.equal(output.sequences, expected)
