"""What a generation config says, its file says, and a file that says nonsense is named."""

import pytest
from transformers import AutoModelForCausalLM

from dllm_trl import DiffusionGenerationConfig
from dllm_trl.generation.samplers import SAMPLERS

from ..trainers.tiny_rl import make_model


def mine(scores, masked, quota, **kwargs):
    return SAMPLERS["sequential"](scores, masked, quota, **kwargs)


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_strategy_of_ones_own_is_left_out_of_the_file(family, tmp_path, caplog):
    model = make_model(family)
    model.generation_config.remasking_strategy = mine
    model.generation_config.confidence_threshold = 0.5
    model.save_pretrained(tmp_path)
    assert "`remasking_strategy` is a function of your own, <function mine" in caplog.text
    assert model.generation_config.remasking_strategy is mine
    again = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (again.remasking_strategy, again.confidence_threshold) == (None, 0.5)


def test_strategy_of_the_package_is_saved_by_its_name(tmp_path):
    for name, function in SAMPLERS.items():
        DiffusionGenerationConfig(remasking_strategy=function).save_pretrained(tmp_path)
        assert DiffusionGenerationConfig.from_pretrained(tmp_path).remasking_strategy == name


def test_dictionaries_keep_the_function():
    config = DiffusionGenerationConfig(remasking_strategy=mine, block_length=4)
    values = {key: value for key, value in config.to_dict().items() if value is not None}
    for again in (DiffusionGenerationConfig(**values), DiffusionGenerationConfig.from_dict(values)):
        assert again.remasking_strategy is mine
        assert again == config and hash(again) == hash(config)
    assert "mine" in repr(config)
    assert config != DiffusionGenerationConfig(remasking_strategy=lambda *args, **kwargs: None, block_length=4)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[1]", '"a"', '{"eos_token_id": 1,}', '{"temperature": "hot"}', '{"temperature": -1}']
    + ['{"remasking_strategy": "mine"}', '{"block_length": 1.5}', '{"max_new_tokens": NaN}', "\udcff\udcfe"],
)
def test_malformed_file_is_named(text, tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match="`generation_config.json` of `.*` cannot be used: .* Mend the file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_absent_file_is_fine(tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == 1  # the config's


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "confidence_threshold", "entropy_bound"])
def test_nan_is_no_number(name):
    with pytest.raises(ValueError, match=f"`{name}` .*nan"):
        DiffusionGenerationConfig(**{name: float("nan")})


@pytest.mark.parametrize("name", ["cfg_scale", "alg_temp", "temperature"])
def test_infinity_is_no_scale(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 0"):
        DiffusionGenerationConfig(**{name: float("inf")})


@pytest.mark.parametrize(
    "name", ["max_new_tokens", "max_length", "block_length", "denoising_steps", "mask_token_id", "seed", "top_k"]
)
@pytest.mark.parametrize("value", [1.5, True, -1, float("nan"), "3"])
def test_counts_are_integers(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least"):
        DiffusionGenerationConfig(**{name: value})
