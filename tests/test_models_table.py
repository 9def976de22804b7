"""
docs/models.md and docs/objectives.md say what the code does, and each cell of their tables is tried on a tiny model.
"""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModel, AutoModelForCausalLM

from dllm_trl import DiffusionGRPOConfig, DiffusionGRPOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer
from dllm_trl.objectives import OBJECTIVES, SFT_OBJECTIVES

from . import models_table
from .trainers.tiny_rl import LENIENT, ON_CPU, TINY, make_model, make_prompts, make_tokenizer


EXAMPLES = {"prompt": ["1+2=", "2+2= "], "completion": ["3 is it", "4!"]}
OPTIONS = {"max_steps": 1, "learning_rate": 1e-2, "gradient_checkpointing": False, "disable_tqdm": True, **ON_CPU}


@pytest.mark.parametrize("path", models_table.PAGES, ids=lambda path: path.stem)
def test_pages_are_up_to_date(path):
    page = path.read_text()
    assert models_table.fill(page, models_table.PAGES[path]) == page, "Run `python -m tests.models_table --write`."


def test_every_family_is_tried():
    assert {type(make_model(family).config) for family in TINY} == set(models_table.families())


@pytest.mark.parametrize("family", TINY)
def test_load_and_save(tmp_path, family):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == model.config.model_type
    assert config["architectures"] == [type(model).__name__]
    ids = torch.arange(6, 13)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) is models_table.head_class(type(model.config))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
        base = AutoModel.from_pretrained(tmp_path)
        if isinstance(base, type(model)):
            torch.testing.assert_close(base(ids).logits, model(ids).logits)
        else:
            torch.testing.assert_close(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("family", TINY)
def test_generate_with_each_cache(family):
    model = make_model(family)
    mine = models_table.CACHES[model.config.diffusion_attention]
    ids = torch.arange(6, 13)[None]
    options = {"max_new_tokens": 8, "block_length": 4, "eos_token_id": -1, "pad_token_id": 0}
    assert model.generate(ids, **options).shape == (1, 15)
    for cache in ("exact", "none", "prefix", "dual"):
        if cache in mine:
            output = model.generate(ids, cache=cache, **options)
            assert output.shape == (1, 15) and not (output == model.config.mask_token_id).any()
        else:
            with pytest.raises(ValueError, match="cache"):
                model.generate(ids, cache=cache, **options)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def train(trainer):
    before = weights(trainer.model)
    trainer.train()
    return {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}


def step_maps() -> dict:
    """The column that `"trace"` needs: left to right, two tokens a step."""
    tokenizer = make_tokenizer()
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in EXAMPLES["completion"]]  # and EOS
    return {"step_map": [[i // 2 for i in range(length)] for length in lengths]}


@pytest.mark.parametrize("objective", SFT_OBJECTIVES)
@pytest.mark.parametrize("family", TINY)
def test_sft_objective(tmp_path, family, objective):
    model = make_model(family)
    columns = step_maps() if objective == "trace" else {}

    def make_trainer():
        return DiffusionSFTTrainer(
            model=model,
            args=DiffusionSFTConfig(str(tmp_path), objective=objective, block_length=4, max_length=64, **OPTIONS),
            train_dataset=Dataset.from_dict(EXAMPLES | columns),
            processing_class=make_tokenizer(),
        )

    if objective in models_table.takes(SFT_OBJECTIVES, type(model.config)):
        assert train(make_trainer())
    else:
        with pytest.raises(ValueError, match="objective"):
            make_trainer()


def every_second(completions, **kwargs):
    """Right and wrong in every group, so that there is something to learn."""
    return [float(i % 2) for i in range(len(completions))]


def make_rl_trainer(tmp_path, model, objective, **options):
    args = DiffusionGRPOConfig(
        str(tmp_path),
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=12,
        block_length=4,
        objective_kwargs=LENIENT.get(objective),
        **OPTIONS,
    )
    return DiffusionGRPOTrainer(
        model=model,
        reward_funcs=every_second,
        args=args,
        train_dataset=make_prompts(4),
        processing_class=make_tokenizer(),
        objective=objective,
        **options,
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", TINY)
def test_rl_objective(tmp_path, family, objective):
    model = make_model(family)
    if objective in models_table.takes(OBJECTIVES, type(model.config)):
        assert train(make_rl_trainer(tmp_path, model, objective))
    else:
        with pytest.raises(ValueError, match="objective"):
            make_rl_trainer(tmp_path, model, objective)


@pytest.mark.parametrize("family", TINY)
def test_lora(tmp_path, family):
    changed = train(make_rl_trainer(tmp_path, make_model(family), "trace", peft_config=LoraConfig(r=2)))
    assert changed and all("lora_" in name for name in changed)
    assert {name.split(".lora_")[0].split(".")[-1] for name in changed} == {"q_proj", "v_proj"}
