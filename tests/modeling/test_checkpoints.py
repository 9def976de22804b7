"""Published folders load with no remote code and no question asked, and are saved in the published format."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_propagation, enable_propagation

import dllm_trl  # noqa: F401
from dllm_trl.modeling.sdar import (
    SDARConfig,
    SDARForCausalLM,
    SDARModel,
    SDARMoeConfig,
    SDARMoeForCausalLM,
    SDARMoeModel,
)


CLASSES = {
    "sdar": (SDARConfig, SDARModel, SDARForCausalLM),
    "sdar_moe": (SDARMoeConfig, SDARMoeModel, SDARMoeForCausalLM),
}


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch):
    """A prompt for permission to run remote code is a failure."""

    def refuse(*args, **kwargs):
        raise AssertionError("transformers asked for permission to run remote code")

    monkeypatch.setattr("builtins.input", refuse)


@pytest.fixture(params=CLASSES)
def published(request, golden_dir):
    return golden_dir / request.param


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(source, target, **changes):
    """A copy of a checkpoint with other config values; `None` drops a key."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    (target / "config.json").chmod(0o644)
    config = {key: value for key, value in {**read_config(source), **changes}.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_auto_classes(published):
    config_class, model_class, causal_lm_class = CLASSES[published.name]
    assert type(AutoConfig.from_pretrained(published)) is config_class
    backbone = AutoModel.from_pretrained(published)
    assert type(backbone) is model_class
    model, info = AutoModelForCausalLM.from_pretrained(published, output_loading_info=True)
    assert type(model) is causal_lm_class
    assert not any(info.values())
    assert type(model.model) is model_class
    for name, parameter in model.model.named_parameters():
        assert torch.equal(backbone.get_parameter(name), parameter), name
    assert type(AutoModelForCausalLM.from_config(model.config)) is causal_lm_class


def test_saved_as_published(published, tmp_path):
    # Not the defaults of transformers 5, nor those of the public code.
    source = write_config(published, tmp_path / "source", rope_theta=123456.0, torch_dtype="bfloat16", use_cache=True)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "saved")

    expected, saved = read_config(source), read_config(tmp_path / "saved")
    expected.pop("transformers_version"), saved.pop("transformers_version")
    assert {key: saved.get(key, "missing") for key in expected} == expected
    # Nothing under a name that transformers 4 does not know.
    assert not {"rope_parameters", "dtype", "num_local_experts"} & set(saved)

    weights, saved_weights = load_file(source / "model.safetensors"), load_file(tmp_path / "saved/model.safetensors")
    assert saved_weights.keys() == weights.keys()
    for name, weight in weights.items():
        assert saved_weights[name].dtype == torch.bfloat16
        assert torch.equal(saved_weights[name], weight.bfloat16()), name


def test_saved_folder_loads_again(published, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(published)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.to_diff_dict() == {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_scaled_rope_survives(published, tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    source = write_config(published, tmp_path / "source", rope_scaling=scaling)
    config = AutoConfig.from_pretrained(source)
    assert config.rope_parameters == {**scaling, "rope_theta": 1000000}
    config.save_pretrained(tmp_path / "saved")
    saved = read_config(tmp_path / "saved")
    assert (saved["rope_scaling"], saved["rope_theta"]) == (scaling, 1000000)
    assert AutoConfig.from_pretrained(tmp_path / "saved").rope_parameters == config.rope_parameters


def test_new_model_is_saved_with_its_theta(tmp_path):
    SDARConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, dtype="float32").save_pretrained(tmp_path)
    saved = read_config(tmp_path)
    assert (saved["rope_theta"], saved["rope_scaling"], saved["torch_dtype"]) == (1e6, None, "float32")


def test_attention_implementation_is_the_users_choice(golden_dir, tmp_path):
    assert read_config(golden_dir / "sdar")["attn_implementation"] == "flex_attention"
    for arguments, expected in [({}, "sdpa_plan"), ({"attn_implementation": "eager"}, "eager")]:
        model = AutoModelForCausalLM.from_pretrained(golden_dir / "sdar", **arguments)
        assert model.config._attn_implementation == expected
        config = AutoConfig.from_pretrained(golden_dir / "sdar", **arguments)
        assert SDARForCausalLM(config).config._attn_implementation == expected
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa_plan"
    model.set_attn_implementation("flex_attention")
    assert model.config._attn_implementation == "flex_attention"


def test_block_size_and_mask_token(published, tmp_path):
    source = write_config(published, tmp_path / "source", block_size=None, mask_token_id=None)
    config = AutoConfig.from_pretrained(source)
    assert (config.block_size, config.mask_token_id, config.logit_shift) == (4, 151669, 0)
    model = AutoModelForCausalLM.from_pretrained(source, block_size=16)
    assert model.config.block_size == 16
    model.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").block_size == 16


def test_unknown_architecture(published, tmp_path):
    source = write_config(published, tmp_path / "source", architectures=["SDARVisionModel"])
    with pytest.raises(ValueError, match=r"\['SDARVisionModel'\].*Known: SDAR(Moe)?ForCausalLM, SDAR(Moe)?Model"):
        AutoModelForCausalLM.from_pretrained(source)


def test_tokenizer(tokenizers_dir, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizers_dir / "sdar", folder)
    if not (folder / "vocab.json").exists():
        # The real vocabulary is several megabytes. One of single bytes gives the special tokens their published ids.
        folder.chmod(0o755)
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
        tokens = alphabet + [f"<unused{i}>" for i in range(151643 - len(alphabet))]
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|MASK|>", 151669)
    assert tokenizer.decode(tokenizer("What is 2 + 2?").input_ids) == "What is 2 + 2?"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(text).input_ids[0] == 151644

    tokenizer.save_pretrained(tmp_path / "saved")
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.mask_token_id == 151669


def test_default_lora_targets(published):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(published), peft.LoraConfig())
    adapted = {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"q_proj", "v_proj"}


def test_experts_run_together(golden_dir):
    model = AutoModelForCausalLM.from_pretrained(golden_dir / "sdar_moe")
    assert model.config._experts_implementation == "grouped_mm"
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"


def test_loading_and_saving_warn_of_nothing(published, tmp_path, caplog):
    logging.Logger.warning_once.cache_clear()
    enable_propagation()
    try:
        AutoModelForCausalLM.from_pretrained(published).save_pretrained(tmp_path)
    finally:
        disable_propagation()
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
