"""What training leaves in a folder is what was loaded, and the configs refuse what is no number or no count."""

import json

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from dllm_trl import DiffusionGRPOConfig, DiffusionSFTConfig, DiffusionSFTTrainer, TraceRLConfig, TraceRLTrainer

from .tiny_rl import ON_CPU, letter_reward, make_model, make_prompts, make_tokenizer


def trainer(kind, model, folder, **options):
    if kind == "sft":
        args = DiffusionSFTConfig(str(folder), max_steps=1, per_device_train_batch_size=2, max_length=16, **ON_CPU)
        data = Dataset.from_dict({"text": ["abc def", "12+3=15"]})
        return DiffusionSFTTrainer(
            model=model, args=args, train_dataset=data, processing_class=make_tokenizer(), **options
        )
    args = TraceRLConfig(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        **ON_CPU,
    )
    return TraceRLTrainer(
        model=model,
        reward_funcs=letter_reward,
        args=args,
        train_dataset=make_prompts(4),
        processing_class=make_tokenizer(),
        **options,
    )


@pytest.mark.parametrize("kind", ["sft", "rl"])
@pytest.mark.parametrize("family", ["sdar", "llada"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_use_cache_is_what_was_loaded(kind, family, use_cache, tmp_path):
    make_model(family, use_cache=use_cache).save_pretrained(tmp_path / "published")
    run = trainer(kind, str(tmp_path / "published"), tmp_path / "out")
    run.train()
    run.save_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["use_cache"] is use_cache


@pytest.mark.parametrize("kind", ["sft", "rl"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_adapter_without_task_type_loads_as_one_of_a_causal_model(kind, wrapped, tmp_path):
    peft = pytest.importorskip("peft")
    make_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2)
    if wrapped:
        run = trainer(kind, peft.get_peft_model(model, config), tmp_path / "out")
    else:
        run = trainer(kind, model, tmp_path / "out", peft_config=config)
    run.train()
    run.save_model(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = {name: weight for name, weight in run.model.state_dict().items() if "lora_" in name}
    assert ids and all((again.state_dict()[name] == weight).all() for name, weight in ids.items())


@pytest.mark.parametrize("value", [1.5, float("nan"), -1, True, "4"])
@pytest.mark.parametrize(
    "config, name",
    [(DiffusionGRPOConfig, name) for name in ("block_length", "denoising_steps", "num_slots", "rounds_per_forward")]
    + [(DiffusionGRPOConfig, name) for name in ("num_scored_pads", "overlong_slack", "max_completion_length")]
    + [(TraceRLConfig, "shrink"), (DiffusionSFTConfig, "shrink"), (DiffusionSFTConfig, "max_length")]
    + [(DiffusionSFTConfig, name) for name in ("block_length", "eos_fill_length", "rounds_per_forward")],
)
def test_counts(config, name, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must be "):
        config(str(tmp_path), **ON_CPU, **{name: value})


@pytest.mark.parametrize(
    "config, name",
    [(DiffusionGRPOConfig, "temperature"), (TraceRLConfig, "temperature")]
    + [(DiffusionSFTConfig, name) for name in ("noise_eps", "noise_max", "cart_p")],
)
def test_nan(config, name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must .*nan"):
        config(str(tmp_path), **ON_CPU, **{name: float("nan")})
