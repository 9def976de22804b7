"""An embedding that is wider than its tokenizer: ids that no text holds are sampled behind no door."""

import json

import pytest
import torch

from dllm_trl.evaluation import accuracy, evaluate_accuracy
from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from dllm_trl.generation.vocabulary import decode_texts, suppressed_ids
from dllm_trl.trainers.rollouts import EngineRollouts, make_parameters
from tests.trainers.test_tracerl_trainer import make_trainer
from tests.trainers.tiny_rl import TINY, letter_reward, make_model, make_tokenizer


FAMILY = pytest.mark.parametrize("family", TINY)
WIDE = 150
KW = {"max_new_tokens": 12, "do_sample": True, "temperature": 5.0, "seed": 0, "eos_token_id": -1}
PROMPTS = [[10, 11, 12, 13, 14], [20, 21]]


def sample(model, **kwargs):
    """Ids that each of the doors of decoding samples."""
    rollout = generate_rollouts(model, PROMPTS, DiffusionGenerationConfig(**KW), num_generations=4, **kwargs)
    prompt = torch.tensor(PROMPTS[:1])
    sequences = model.generate(prompt, **KW, num_return_sequences=4, **kwargs)
    return set(rollout.canvas_ids.flatten().tolist()), set(sequences.flatten().tolist())


@FAMILY
def test_ids_beyond_the_tokenizer(family):
    model, tokenizer = make_model(family, vocab_size=WIDE).eval(), make_tokenizer()
    assert all(max(ids) >= len(tokenizer) for ids in sample(model)) or family == "mmada"  # image codes, suppressed
    assert all(max(ids) < len(tokenizer) for ids in sample(model, tokenizer=tokenizer))
    everything = DiffusionGenerationConfig(**KW, suppress_tokens=[])
    for config in (everything, everything.to_dict()):
        given = {"generation_config": config} if config is everything else config
        ids = model.generate(torch.tensor(PROMPTS[:1]), **given, tokenizer=tokenizer)
        assert ids.max() < len(tokenizer)


@FAMILY
def test_evaluation_and_training_sample_the_same_ids(family, tmp_path):
    model, tokenizer = make_model(family, vocab_size=WIDE), make_tokenizer()
    problems = [{"prompt": tokenizer.decode(ids)} for ids in PROMPTS]
    seen = []

    def reward(completions, completion_ids, **kwargs):
        seen.extend(token for row in completion_ids for token in row)
        return letter_reward(completions)

    config = DiffusionGenerationConfig(**KW)
    report = evaluate_accuracy(model, tokenizer, problems, reward, config, show_progress=False)
    assert seen and max(seen) < len(tokenizer)
    assert report.decoding["suppress_tokens"] == suppressed_ids(model.config, tokenizer)
    json.dumps(report.decoding)

    trainer = make_trainer(tmp_path, model, temperature=5.0, generation_kwargs={"suppress_tokens": [9]})
    parameters = make_parameters(trainer)
    assert parameters.suppress_tokens == sorted({9, *suppressed_ids(model.config, tokenizer)})
    rollout = EngineRollouts(trainer).generate(PROMPTS, parameters, seed=0, first_row=0)
    assert rollout.canvas_ids.max() < len(tokenizer) and not (rollout.canvas_ids == 9).any()


def test_ids_between_those_of_the_tokenizer():
    tokenizer = make_tokenizer()
    config = make_model("sdar", vocab_size=WIDE).config
    assert suppressed_ids(config, tokenizer) == list(range(len(tokenizer), WIDE))
    vocab = {token: i for token, i in tokenizer.get_vocab().items() if i not in (7, 8)}
    tokenizer.get_vocab = lambda: vocab | {"<far>": WIDE + 1}
    assert suppressed_ids(config, tokenizer) == [7, 8, *range(len(vocab) + 2, WIDE)]
    with pytest.raises(ValueError, match="`tokenizer` must be the model's tokenizer, but is 5"):
        generate_rollouts(make_model(), PROMPTS, max_new_tokens=4, tokenizer=5)


def test_an_unknown_id_ends_no_evaluation(monkeypatch):
    """Tokenizers in Python raise for ids that they have no token for."""
    model, tokenizer = make_model(vocab_size=WIDE), make_tokenizer()
    decode = tokenizer.batch_decode

    def strict(rows, **kwargs):
        return decode([["".join(tokenizer.convert_ids_to_tokens(row)) and token for token in row] for row in rows])

    monkeypatch.setattr(tokenizer, "batch_decode", strict)
    with pytest.raises(TypeError):
        tokenizer.batch_decode([[10, WIDE - 1, 11]])
    assert decode_texts(tokenizer, [[10, WIDE - 1, 11], []]) == decode([[10, 11], []])

    def careless(*args, tokenizer, **kwargs):
        rollout = generate_rollouts(*args, **kwargs)
        assert rollout.completion_ids.max() >= len(make_tokenizer())
        return rollout

    monkeypatch.setattr(accuracy, "generate_rollouts", careless)
    config = DiffusionGenerationConfig(**KW)
    problems = [{"prompt": "1+1="}, {"prompt": "ab"}]
    report = evaluate_accuracy(model, tokenizer, problems, letter_reward, config, show_progress=False)
    assert report.num_problems == 2
