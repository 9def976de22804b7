"""Every option of transformers' `GenerationConfig` acts, is refused with a reason, or is known to change nothing."""

import threading
import time

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, WatermarkingConfig
from transformers.generation.stopping_criteria import MaxTimeCriteria

from dllm_trl.evaluation import evaluate_accuracy
from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from dllm_trl.generation.configuration import ARGUMENTS, REFUSED, WITHOUT_EFFECT
from dllm_trl.generation.processors import OFF
from tests.trainers.tiny_rl import BLOCK, FULL, make_model, make_tokenizer

from .conftest import left_pad, ragged_prompts, tiny_model


PROMPT = torch.tensor([[5, 9, 2, 7, 11]])
ONE_BY_ONE = {"remasking_strategy": "sequential", "denoising_schedule": "even"}
FAMILIES = [*BLOCK, *FULL]


@pytest.fixture(scope="module", params=FAMILIES)
def any_model(request):
    return tiny_model(request.param)


def response(model, prompt=PROMPT, **kwargs):
    kwargs = {"max_new_tokens": 8, "block_length": 4, "do_sample": False, "seed": 0, "suppress_tokens": []} | kwargs
    return model.generate(prompt, **kwargs)[0, prompt.size(1) :].tolist()


# A value of each option that acts, with what else it needs; `eos` and `token` stand for ids of a plain response
ACTING = {
    "max_length": ({"max_length": 9, "max_new_tokens": None}, {}),
    "max_new_tokens": ({"max_new_tokens": 3}, {}),
    "do_sample": ({"do_sample": True, "temperature": 3.0}, {}),
    "temperature": ({"temperature": 3.0, "do_sample": True}, {"do_sample": True}),
    "top_k": ({"top_k": 1}, {"do_sample": True}),
    "top_p": ({"top_p": 0.05}, {"do_sample": True}),
    "min_p": ({"min_p": 1.0}, {"do_sample": True}),
    "top_h": ({"top_h": 0.01}, {"do_sample": True}),
    "typical_p": ({"typical_p": 0.05}, {"do_sample": True, "temperature": 2.0}),
    "epsilon_cutoff": ({"epsilon_cutoff": 0.9}, {"do_sample": True}),
    "eta_cutoff": ({"eta_cutoff": 0.9}, {"do_sample": True}),
    "repetition_penalty": ({"repetition_penalty": 50}, {"max_new_tokens": 24}),
    "encoder_repetition_penalty": ({"encoder_repetition_penalty": 50.0}, {}),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 1}, ONE_BY_ONE),
    "encoder_no_repeat_ngram_size": ({"encoder_no_repeat_ngram_size": 1}, {"encoder_repetition_penalty": 50.0}),
    "bad_words_ids": ({"bad_words_ids": [["token"]]}, {}),
    "sequence_bias": ({"sequence_bias": [[["token"], -100.0]]}, {}),
    "suppress_tokens": ({"suppress_tokens": ["token"]}, {}),
    "begin_suppress_tokens": ({"begin_suppress_tokens": ["token"]}, {}),
    "min_new_tokens": ({"min_new_tokens": 6}, {"eos_token_id": "eos"}),
    "min_length": ({"min_length": 11}, {"eos_token_id": "eos"}),
    "forced_eos_token_id": ({"forced_eos_token_id": 3}, {}),
    "exponential_decay_length_penalty": ({"exponential_decay_length_penalty": (0, 100.0)}, {"eos_token_id": 3}),
    "watermarking_config": ({"watermarking_config": {"bias": 100.0}}, ONE_BY_ONE),
    "eos_token_id": ({"eos_token_id": "eos"}, {}),
    "pad_token_id": ({"pad_token_id": 4}, {"eos_token_id": "eos"}),
    "max_time": ({"max_time": 1e-9}, {}),
}
# Their effect has a test of its own
ELSEWHERE = {"stop_strings", "num_return_sequences", "return_dict_in_generate", "num_beams"}


def filled(value, ids):
    if isinstance(value, dict):
        return {key: filled(entry, ids) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(filled(entry, ids) for entry in value)
    return ids.get(value, value) if isinstance(value, str) else value


def test_no_option_is_forgotten():
    known = [set(ACTING), ELSEWHERE, set(REFUSED), set(WITHOUT_EFFECT)]
    assert set().union(*known) == set(vars(GenerationConfig()))
    assert sum(map(len, known)) == len(set().union(*known))
    assert set(OFF) <= set(ACTING)


@pytest.mark.parametrize("name", ACTING)
def test_options_act(any_model, name):
    plain = response(any_model)
    ids = {"token": plain[0], "eos": plain[0]}
    given, needed = filled(ACTING[name], ids)
    without = response(any_model, **needed)
    assert response(any_model, **(needed | given)) != without
    # The same as a config, stock or ours
    for kind in (GenerationConfig, DiffusionGenerationConfig):
        config = kind(**given)
        explicit = {"max_new_tokens": given.get("max_new_tokens", 8)} if "max_length" not in given else {}
        length = {"max_new_tokens": None} if "max_length" in given else explicit
        kwargs = {key: value for key, value in needed.items() if key not in given}
        kwargs = {"suppress_tokens": given.get("suppress_tokens", [])} | kwargs
        if "do_sample" in given:
            kwargs["do_sample"] = given["do_sample"]
        assert response(any_model, generation_config=config, **(length | kwargs)) != without
    if name in OFF and OFF[name] is not None:  # off is off
        assert response(any_model, **(needed | {name: OFF[name]})) == without or name in needed


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_nothing_here_are_refused(sdar, name):
    value = {"early_stopping": True, "length_penalty": 2.0, "cache_implementation": "static"}.get(name, 3)
    config = GenerationConfig()
    setattr(config, name, value)
    model = tiny_model()
    with pytest.raises(ValueError, match=f"`{name}"):
        sdar.generate(PROMPT, max_new_tokens=4, **{name: value})
    with pytest.raises(ValueError, match=f"`{name}=.* is not supported by diffusion decoding: .*Leave it out"):
        sdar.generate(PROMPT, config, max_new_tokens=4)
    with pytest.raises(ValueError, match=f"`{name}=.* is not supported"):
        generate_rollouts(sdar, [[5, 9]], config, max_new_tokens=4)
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=rf"`model.generation_config.{name} = None`"):
        model.generate(PROMPT, max_new_tokens=4)
    for off in (None, GenerationConfig._get_default_generation_params().get(name)):
        assert response(sdar, **{name: off}) == response(sdar)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_are_not_supported(sdar, name):
    assert response(sdar, **{name: None}) == response(sdar)
    with pytest.raises(ValueError, match=f"`{name}` is not supported"):
        sdar.generate(PROMPT, **{name: object()})


def test_stock_defaults_and_round_trips(sdar):
    expected = response(sdar)
    defaults = GenerationConfig._get_default_generation_params()
    assert response(sdar, generation_config=GenerationConfig(**defaults), top_k=0) == expected
    assert response(sdar, guidance_scale=None) == response(sdar, guidance_scale=1.0) == expected
    config = DiffusionGenerationConfig(block_length=4, max_new_tokens=8, watermarking_config={"bias": 3.0})
    assert DiffusionGenerationConfig(**config.to_dict()) == config
    assert isinstance(config.watermarking_config, WatermarkingConfig)
    with pytest.raises(ValueError, match="use `cfg_scale`"):
        sdar.generate(PROMPT, guidance_scale=2.0)
    for name in WITHOUT_EFFECT.keys() & {"use_cache", "disable_compile", "renormalize_logits"}:
        assert response(sdar, **{name: True}) == response(sdar, **{name: False}) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_repeat_ngram_size", 2),
        ("encoder_no_repeat_ngram_size", 2),
        ("bad_words_ids", [[3], [4, 5]]),
        ("sequence_bias", {(4, 5): 1.0}),
        ("watermarking_config", {"bias": 2.0}),
        ("prefix_allowed_tokens_fn", lambda row, ids: [3]),
    ],
)
def test_phrases_need_left_to_right_order(any_model, name, value):
    for order in ({}, {"remasking_strategy": "sequential", "denoising_steps": 2}):
        with pytest.raises(ValueError, match=f"`{name}.*goes by the tokens before the next one"):
            response(any_model, **{name: value}, **order)
    response(any_model, **{name: value}, **ONE_BY_ONE)


def test_phrases(any_model):
    plain = response(any_model, **ONE_BY_ONE)
    pair = plain[2:4]
    for kwargs in ({"bad_words_ids": [pair]}, {"sequence_bias": {tuple(pair): -1000.0}}):
        other = response(any_model, **ONE_BY_ONE, **kwargs)
        assert other[:3] == plain[:3] and other[3] != plain[3]
    repeated = response(any_model, max_new_tokens=40, no_repeat_ngram_size=2, **ONE_BY_ONE)
    whole = PROMPT[0].tolist() + repeated
    pairs = list(zip(whole, whole[1:], strict=False))
    assert len(set(pairs)) == len(pairs)


def test_prefix_allowed_tokens(any_model):
    batch, seen = left_pad(ragged_prompts((3, 5))), []

    def allowed(row, ids):
        seen.append((row, ids.tolist()))
        return [10 + row, 20 + row]

    output = any_model.generate(
        **batch, prefix_allowed_tokens_fn=allowed, max_new_tokens=6, block_length=4, **ONE_BY_ONE
    )[:, 5:]
    assert [set(row) <= {10 + i, 20 + i} for i, row in enumerate(output.tolist())] == [True, True]
    for row, ids in seen:  # the row's own tokens, without padding
        whole = ragged_prompts((3, 5))[row] + output[row].tolist()
        assert ids == whole[: len(ids)]
    with pytest.raises(ValueError, match="allows no token"):
        response(any_model, prefix_allowed_tokens_fn=lambda row, ids: [], **ONE_BY_ONE)


def test_rules_of_places_hold_for_ragged_rows(any_model):
    prompts = ragged_prompts((3, 5, 8))
    plain = generate_rollouts(any_model, prompts, DiffusionGenerationConfig(block_length=4), max_new_tokens=9)
    eos = sorted(set(plain.completion_ids[:, :5].flatten().tolist()))
    config = DiffusionGenerationConfig(
        block_length=4, eos_token_id=eos, min_new_tokens=4, forced_eos_token_id=eos[0], begin_suppress_tokens=[7]
    )
    limits = [9, 7, 6]
    for slots in (None, 1):
        rollout = generate_rollouts(any_model, prompts, config, max_new_tokens=limits, num_slots=slots)
        for limit, ids, mask in zip(limits, rollout.completion_ids, rollout.completion_mask, strict=True):
            ids = ids[mask.bool()].tolist()
            assert not set(ids[:4]) & set(eos) and ids[0] != 7
            assert ids[-1] in eos and (len(ids) < limit or ids[-1] == eos[0])
    for clash in ({"suppress_tokens": [3]}, {"suppress_eos": True, "eos_token_id": 3}):
        with pytest.raises(ValueError, match="`forced_eos_token_id"):
            response(any_model, forced_eos_token_id=3, **clash)


def test_processors_come_before_the_temperature(sdar):
    """As in transformers: a bias is one of the logits, not of logits / temperature."""
    seen = []

    def record(input_ids, scores):
        seen.append(scores[0].clone())
        return scores

    response(sdar, do_sample=True, temperature=1.0, logits_processor=[record])
    response(sdar, do_sample=True, temperature=4.0, logits_processor=[record])
    assert torch.equal(seen[0], next(s for s in seen[1:] if torch.equal(s, seen[0])))
    biased = {"sequence_bias": {(3,): 1e4}, "do_sample": True, "temperature": 50.0}
    assert set(response(sdar, **biased)) == {3}


class Slow(torch.nn.Module):
    def forward(self, *args):
        time.sleep(0.02)


@pytest.mark.parametrize("as_criterion", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_time_limit(family, as_criterion):
    """Rows end as they are: what was committed from the start without a gap; waiting rows have nothing."""
    model = tiny_model(family)
    model.model.embed_tokens.register_forward_hook(lambda *args: time.sleep(0.05))
    kwargs = {"max_new_tokens": 100, "seed": 1, "do_sample": True, "temperature": 5.0, "suppress_tokens": []}
    kwargs |= {"stopping_criteria": [MaxTimeCriteria(0.12)]} if as_criterion else {"max_time": 0.12}
    begin = time.time()
    output = model.generate(
        PROMPT.repeat(2, 1), remasking_strategy="random", return_dict_in_generate=True, pad_token_id=0, **kwargs
    )
    assert time.time() - begin < 2
    assert 1 <= output.num_forward_passes.max() < 20
    committed = output.step_map >= 0
    assert (output.logprobs[~committed] == 0).all()
    for row, (ids, steps) in enumerate(zip(output.sequences[:, 5:], committed, strict=True)):
        head = int(torch.cat([steps, torch.tensor([False])]).int().argmin())
        assert torch.equal(ids[:head], output.canvas_ids[row, :head]) and (ids[head:] == 0).all()
        assert model.config.mask_token_id not in ids
        gaps = output.canvas_mask[row].bool() & ~steps
        assert (output.canvas_ids[row][gaps] == model.config.mask_token_id).all()
    if not as_criterion:
        config = DiffusionGenerationConfig(**{k: v for k, v in kwargs.items() if k != "max_new_tokens"})
        rollout = generate_rollouts(model, [[5, 9, 2], [7] * 6], config, max_new_tokens=100, num_slots=1)
        assert rollout.completion_mask[1].sum() == 0 and rollout.num_forward_passes[1] == 0
        model = make_model(family)
        with pytest.raises(ValueError, match="`max_time`"):
            evaluate_accuracy(model, make_tokenizer(), [{"prompt": "1+1=", "answer": "2"}], generation_config=config)


class Lookback(StoppingCriteria):
    """As lm-eval's: a list with an entry per row of the batch, and the width of the prompts."""

    def __init__(self, token, width, rows):
        self.token, self.width, self.done = token, width, [False] * rows

    def __call__(self, input_ids, scores, **kwargs):
        tails = input_ids[:, self.width :].tolist()
        for row, done in enumerate(self.done):
            if not done:
                self.done[row] = self.token in tails[row]
        return False not in self.done


class Lazy(StoppingCriteria):
    """Makes its state from the first batch it sees."""

    def __init__(self, token, width, event):
        self.token, self.seen, self.event = token, {}, event

    def __call__(self, input_ids, scores, **kwargs):
        assert not self.event.is_set()  # objects that cannot be copied are shared
        self.seen.setdefault("done", torch.zeros(len(input_ids), dtype=torch.bool))
        self.seen["done"] |= (input_ids[:, -4:] == self.token).any(1)
        return self.seen["done"]


@pytest.mark.parametrize("kind", [Lookback, Lazy])
def test_criteria_with_a_state_per_row(any_model, kind):
    prompts = left_pad(ragged_prompts((5, 2, 8)))
    kwargs = {"max_new_tokens": 24, "block_length": 4, "seed": 0, "do_sample": True, "suppress_tokens": []}
    free = any_model.generate(**prompts, **kwargs)[:, 8:]
    token = free[0, 9].item()
    criterion = kind(token, 8, threading.Event() if kind is Lazy else 3)
    stopped = any_model.generate(**prompts, **kwargs, stopping_criteria=[criterion], pad_token_id=0)[:, 8:]
    lengths = []
    for i, size in enumerate((5, 2, 8)):
        start = size % 4 if any_model.config.diffusion_attention == "block" else 0
        ends = [*range(4 - start, 24, 4), 24]
        at = [end for end in ends if token in free[i, :end]]
        lengths.append(at[0] if at else 24)
        expected = free[i].clone()
        expected[lengths[-1] :] = 0
        assert torch.equal(torch.nn.functional.pad(stopped[i], (0, 24 - stopped.size(1))), expected)
    assert lengths[0] < 24


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_strings_cut_where_they_end(family):
    """Also in the middle of a block, behind every door."""
    model, tokenizer = make_model(family).eval(), make_tokenizer()
    config = DiffusionGenerationConfig(
        max_new_tokens=16, eos_token_id=-1, suppress_tokens=list(range(6)), remasking_strategy="random", seed=0
    )
    prompt = tokenizer("1+1=", return_tensors="pt")["input_ids"]
    free = model.generate(prompt, config)[0, 4:]
    stop = tokenizer.decode(free[5:7])
    text = tokenizer.decode(free)
    kept = text.index(stop) + 2
    config.stop_strings = [stop]
    output = model.generate(prompt, config, tokenizer=tokenizer)[0, 4:]
    assert output[:kept].tolist() == free[:kept].tolist() and set(output[kept:].tolist()) <= {0}
    rollout = generate_rollouts(model, [prompt[0].tolist()], config, tokenizer=tokenizer, seed=0)
    assert rollout.completion_mask.sum() == kept
    assert rollout.canvas_mask.sum() >= kept  # what was decoded after it stays the row's context
    report = evaluate_accuracy(
        model, tokenizer, [{"prompt": "1+1=", "answer": "2"}], generation_config=config, show_progress=False
    )
    assert report.records[0]["completion_length"] == kept


def test_one_return_sequence_in_rollouts(sdar):
    with pytest.raises(ValueError, match="`num_return_sequences=2` is `generate`'s"):
        generate_rollouts(sdar, [[5, 9]], DiffusionGenerationConfig(num_return_sequences=2), max_new_tokens=4)


@pytest.mark.parametrize(
    "kwargs",
    [{"typical_p": 1.5}, {"min_new_tokens": 1.5}, {"max_time": 0}, {"eta_cutoff": -1}, {"repetition_penalty": 0}],
)
def test_values_out_of_range(sdar, kwargs):
    with pytest.raises(ValueError, match=f"`{next(iter(kwargs))}` must"):
        response(sdar, **kwargs)
