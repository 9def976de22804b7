"""What the trainers refuse before anything is loaded, function by function."""

import json
import sys

import pytest

from dllm_trl import DiffusionSFTConfig, DiffusionSFTTrainer, TraceRLConfig, TraceRLTrainer
from dllm_trl.modeling import FAMILIES, NAMESAKES
from dllm_trl.trainers.constructor_checks import (
    check_model,
    check_options,
    check_peft,
    check_precision,
    check_router_loss,
)

from .tiny_rl import ON_CPU, TINY, letter_reward, make_model, make_prompts, make_tokenizer


REMOTE_CODE = """
from transformers import Qwen3Config
from dllm_trl.modeling.sdar import SDARConfig, SDARForCausalLM

class {name}Config({base}):
    model_type = "my_{name}"

class {name}ForCausalLM(SDARForCausalLM):
    config_class = {name}Config
"""


def write_remote(folder, name: str, base: str) -> str:
    make_model().save_pretrained(folder)
    (folder / "mine.py").write_text(REMOTE_CODE.format(name=name, base=base))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = f"my_{name}"
    config["auto_map"] = {"AutoConfig": f"mine.{name}Config", "AutoModelForCausalLM": f"mine.{name}ForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_family_of_ones_own_beside_its_checkpoint_needs_trust(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = write_remote(tmp_path / "mine", "Mine", "SDARConfig")
    with pytest.raises(ValueError, match="custom code"):
        check_model(path, None)
    check_model(path, None, True)
    check_model(path, {"trust_remote_code": True})
    with pytest.raises(ValueError, match="custom code"):
        check_model(path, {"trust_remote_code": False}, True)

    path = write_remote(tmp_path / "other", "Other", "Qwen3Config")
    with pytest.raises(ValueError, match="model type `my_Other`, which is no diffusion language model"):
        check_model(path, None, True)


def test_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="`peft_config` has a `PromptTuningConfig`.*Use LoRA"):
        check_peft(make_model(), config)
    with pytest.raises(ValueError, match="`model` has a `PromptTuningConfig`.*Use LoRA"):
        check_peft(peft.get_peft_model(make_model(), config), None)
    check_peft(peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"])), None)
    check_peft("a/model", peft.LoraConfig())


def test_router_loss(tmp_path):
    for arguments in (DiffusionSFTConfig, TraceRLConfig):
        arguments = arguments(str(tmp_path), use_cpu=True, bf16=False, report_to="none", router_aux_loss_coef=0.01)
        for family in ("sdar_moe", "LLaDAMoEModelLM", "sdar"):  # a model without experts is TRL's to refuse
            check_router_loss(make_model(family).config, arguments)
        with pytest.raises(ValueError, match="`llada2_moe` has no load-balancing loss"):
            check_router_loss(make_model("llada2_moe").config, arguments)


def test_there_is_a_tiny_model_of_every_family():
    assert set(TINY) == {*FAMILIES, *(name for names in NAMESAKES.values() for name in names)}


def test_reentrant_checkpointing_and_the_router_loss(tmp_path):
    """It would leave the loss without a gradient."""
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    for kind in (DiffusionSFTConfig, TraceRLConfig):
        arguments = kind(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **reentrant)
        for family in ("sdar_moe", "LLaDAMoEModelLM"):
            with pytest.raises(ValueError, match="`gradient_checkpointing_kwargs=.*without a gradient"):
                check_router_loss(make_model(family).config, arguments)
        check_router_loss(make_model("sdar").config, arguments)
        arguments.router_aux_loss_coef = 0.0
        check_router_loss(make_model("sdar_moe").config, arguments)


def test_half_precision_that_a_cpu_does_not_have(tmp_path):
    for kind in (DiffusionSFTConfig, TraceRLConfig):
        for name in ("fp16", "fp16_full_eval"):
            arguments = kind(str(tmp_path), use_cpu=True, **({"bf16": False} | {name: True}))
            with pytest.raises(ValueError, match=f"`{name}=True` has no effect on a CPU"):
                check_precision(arguments)
        check_precision(kind(str(tmp_path), use_cpu=True, bf16=True))


def test_options_of_rollouts_that_training_cannot_follow(tmp_path):
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none"}
    for given in ({"generation_kwargs": {"max_time": 1.0}}, {"neftune_noise_alpha": 5.0}):
        with pytest.raises(ValueError, match="`max_time`|`neftune_noise_alpha=5.0`"):
            check_options("TraceRLTrainer", TraceRLConfig(str(tmp_path), **quiet, **given), None, {})


@pytest.mark.parametrize("trainer", [DiffusionSFTTrainer, TraceRLTrainer])
def test_a_tokenizer_without_eos_is_refused(tmp_path, trainer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    if trainer is DiffusionSFTTrainer:
        kwargs = {"args": DiffusionSFTConfig(output_dir=tmp_path, **ON_CPU)}
    else:
        kwargs = {"args": TraceRLConfig(output_dir=tmp_path, **ON_CPU), "reward_funcs": letter_reward}
    with pytest.raises(ValueError, match="`processing_class` has no EOS token.*Set `processing_class.eos_token`"):
        trainer(make_model(), train_dataset=make_prompts(), processing_class=tokenizer, **kwargs)
