"""Whatever is done to a model, what `save_pretrained` writes loads again: same logits, same decoded tokens."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..trainers.tiny_rl import TINY, make_model


PROMPT = torch.tensor([[7, 30, 12, 41, 9]])


@pytest.fixture(params=TINY)
def model(request, tmp_path):
    """A model that came from a folder, as nearly all models do."""
    make_model(request.param).save_pretrained(tmp_path / "published")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "published")


def grow(model):
    model.resize_token_embeddings(72)
    torch.nn.init.normal_(model.lm_head.weight[54:], std=0.5)


def shrink(model):
    model.resize_token_embeddings(49)


def grow_and_shrink(model):
    grow(model)
    shrink(model)


def tie(model):
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight


def tie_and_grow(model):
    tie(model)
    model.resize_token_embeddings(80)


def halve(model):
    model.to(torch.bfloat16)


def configure_generation(model):
    values = {"max_new_tokens": 7, "denoising_steps": 2, "remasking_strategy": "margin", "seed": 3, "do_sample": True}
    values |= {"temperature": 0.7, "top_k": 9, "suppress_tokens": [8, 9], "eos_token_id": [1, 50], "mask_token_id": 5}
    for name, value in values.items():
        setattr(model.generation_config, name, value)


def configure_model(model):
    model.config.mask_token_id, model.config.eos_token_id, model.config.pad_token_id = 4, [1, 3], 1
    if model.config.block_size is not None:
        model.config.block_size = 2


def merge_adapter(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False)).merge_and_unload()


def merge_trained_embeddings(model):
    peft = pytest.importorskip("peft")
    grow(model)
    config = peft.LoraConfig(r=4, init_lora_weights=False, modules_to_save=["embed_tokens", "lm_head"])
    adapted = peft.get_peft_model(model, config)
    torch.nn.init.normal_(adapted.get_output_embeddings().weight, std=0.3)
    return adapted.merge_and_unload()


CHANGES = [grow, shrink, grow_and_shrink, tie, tie_and_grow, halve, configure_generation, configure_model]
CHANGES += [merge_adapter, merge_trained_embeddings]


@torch.no_grad()
def assert_same(again, model):
    assert type(again) is type(model) and again.dtype == model.dtype
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    first, second = (m.generation_config.to_dict() | {"_from_model_config": None} for m in (again, model))
    assert first == second
    ids = torch.arange(12)[None] + 20
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    options = {"max_new_tokens": 12, "seed": 0, "temperature": 1.0}
    assert torch.equal(again.generate(PROMPT, **options), model.generate(PROMPT, **options))
    assert torch.equal(again.generate(PROMPT, seed=5), model.generate(PROMPT, seed=5))  # by the checkpoint's own


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_round_trip(model, change, tmp_path):
    model = change(model) or model
    shard = {"max_shard_size": "20KB"} if CHANGES.index(change) % 2 else {}
    model.generation_config.max_new_tokens = model.generation_config.max_new_tokens or 6
    model.save_pretrained(tmp_path / "saved", **shard)
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists() == bool(shard)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(again, model)
    # And once more, from what was loaded
    again.save_pretrained(tmp_path / "again")
    files = ("config.json", "generation_config.json")
    first, second = ([json.loads((tmp_path / d / f).read_text()) for f in files] for d in ("saved", "again"))
    assert first == second


@pytest.mark.parametrize("name", ["mask_token_id", "pad_token_id"])
def test_resizing_keeps_the_tokens_it_lives_on(model, name):
    model.config.mask_token_id, model.config.pad_token_id = 2, 0
    setattr(model.config, name, 50)
    with pytest.raises(ValueError, match=f"`new_num_tokens=50` cuts off the row of `config.{name}=50`.*at least 51"):
        model.resize_token_embeddings(50)
    model.resize_token_embeddings(51)
    assert model.config.vocab_size == 51


@pytest.mark.parametrize("family", ["llada", "mmada"])
@pytest.mark.parametrize("tokens", [136, 127, 200])
def test_names_of_one_size(golden_dir, tmp_path, family, tokens):
    model = AutoModelForCausalLM.from_pretrained(golden_dir / family)
    published = {"vocab_size", "embedding_size", "new_vocab_size"} & model.config.to_dict().keys()
    assert len(published) == 2 + (family == "mmada")
    model.resize_token_embeddings(tokens)
    model.generation_config.max_new_tokens = 6
    assert {getattr(model.config, name) for name in published} == {tokens}
    model.save_pretrained(tmp_path)
    assert {json.loads((tmp_path / "config.json").read_text())[name] for name in published} == {tokens}
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_sizes_that_contradict_each_other(golden_dir, tmp_path):
    config = json.loads((golden_dir / "llada" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "embedding_size": 256}))
    with pytest.raises(ValueError, match="`embedding_size=256` and `vocab_size=128` are two names of one size"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "embedding_size": None}))
    assert AutoConfig.from_pretrained(tmp_path).embedding_size == 128  # as in the public code


def test_image_codes_are_not_said_and_what_is_added_after_them_is(golden_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(golden_dir / "mmada")
    assert model.config.suppressed_token_ids == range(128, 160)
    model.resize_token_embeddings(162)
    model.lm_head.weight.data[[130, 161]] = 0
    model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([130, 161]), logits.max() + 5)
    )
    assert model.config.suppressed_token_ids == range(128, 160)
    assert set(model.generate(PROMPT, max_new_tokens=6, do_sample=False)[0, 5:].tolist()) == {161}
    model.resize_token_embeddings(128)
    assert len(model.config.suppressed_token_ids) == 0


def test_forward_leaves_the_config_as_published(golden_dir, tmp_path):
    for family in ("llada", "dream", "sdar"):
        model = AutoModelForCausalLM.from_pretrained(golden_dir / family)
        before = model.config.to_diff_dict()
        model(PROMPT)
        assert model.config.to_diff_dict() == before


def test_half_precision_keeps_the_rotary_frequencies(model):
    exact = model.model.rotary_emb.inv_freq.clone()
    for change in (model.to, model.type):
        change(torch.bfloat16)
        assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    assert model.dtype == torch.bfloat16
