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
from dllm_trl._compat import load_class
from dllm_trl.modeling import FAMILIES, NAMESAKES
from dllm_trl.modeling.sdar import SDARConfig, SDARForCausalLM

from ..conftest import PUBLISHED


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch):
    """A prompt for permission to run remote code is a failure."""

    def refuse(*args, **kwargs):
        raise AssertionError("transformers asked for permission to run remote code")

    monkeypatch.setattr("builtins.input", refuse)


@pytest.fixture(params=PUBLISHED)
def published(request, published_folder):
    return published_folder(request.param)


@pytest.fixture
def classes(published):
    """Config class, and the names of the classes that the published `auto_map` gives for a backbone and for a head."""
    config = read_config(published)
    namesakes, auto_map = NAMESAKES.get(config["model_type"], {}), config["auto_map"]
    path = next((namesakes[name] for name in config["architectures"] if name in namesakes), None)
    backbone, head = auto_map.get("AutoModel"), auto_map.get("AutoModelForCausalLM")
    names = [(name or other).split(".")[-1] for name, other in ((backbone, head), (head, backbone))]
    return load_class(path or FAMILIES[config["model_type"]]), *names


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(source, target, **changes):
    """A copy of a checkpoint with other config values; `None` drops a key."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    (target / "config.json").chmod(0o644)
    config = {key: value for key, value in {**read_config(source), **changes}.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_auto_classes(published, classes):
    config_class, auto_model, causal_lm = classes
    assert type(AutoConfig.from_pretrained(published)) is config_class
    base = AutoModel.from_pretrained(published)
    model, info = AutoModelForCausalLM.from_pretrained(published, output_loading_info=True)
    assert type(base).__name__ == auto_model
    assert type(model).__name__ == causal_lm
    assert model.get_output_embeddings() is not None
    assert not any(info.values())
    backbone = base.model if auto_model == causal_lm else base
    assert type(backbone) is type(model.model)
    for name, parameter in model.model.named_parameters():
        assert torch.equal(backbone.get_parameter(name), parameter), name
    assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)


def test_saved_as_published(published, tmp_path):
    # Not the defaults of transformers 5, nor those of the public code.
    source = write_config(
        published, tmp_path / "source", rope_theta=123456.0, torch_dtype="bfloat16", use_cache=True, some_key=[1, "x"]
    )
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "saved")

    expected, saved = read_config(source), read_config(tmp_path / "saved")
    expected.pop("transformers_version"), saved.pop("transformers_version")
    assert {key: saved.get(key, "missing") for key in expected} == expected
    # Nothing under a name that transformers 4 does not know.
    assert not {"rope_parameters", "dtype", "num_local_experts", "n_routed_experts"} & set(saved)

    weights, saved_weights = load_file(source / "model.safetensors"), load_file(tmp_path / "saved/model.safetensors")
    assert saved_weights.keys() == weights.keys()
    for name, weight in weights.items():
        routing = name.endswith("expert_bias")  # routing is done in float32
        assert saved_weights[name].dtype == (torch.float32 if routing else torch.bfloat16), name
        assert torch.equal(saved_weights[name], weight.to(saved_weights[name].dtype)), name


def test_saved_in_shards(published, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert read_config(tmp_path)["torch_dtype"] == "float16"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    saved = {}
    for file in set(index.values()):
        saved |= load_file(tmp_path / file)
    assert saved.keys() == index.keys() == load_file(published / "model.safetensors").keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.float16
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_merged_adapter_is_saved_as_published(published, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(published)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids).logits
        adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False)).merge_and_unload()
        merged = adapted(ids).logits
        assert (merged - before).abs().max() > 1e-3
        adapted.save_pretrained(tmp_path)
        assert load_file(tmp_path / "model.safetensors").keys() == load_file(published / "model.safetensors").keys()
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, merged)


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
    theta = read_config(published)["rope_theta"]
    assert config.rope_parameters.items() >= {**scaling, "rope_theta": theta}.items()
    config.save_pretrained(tmp_path / "saved")
    saved = read_config(tmp_path / "saved")
    assert (saved["rope_scaling"], saved["rope_theta"]) == (scaling, theta)
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


DEFAULTS = {  # block size, mask token, shift
    "sdar": (4, 151669, 0),
    "sdar_moe": (4, 151669, 0),
    "dream": (None, 151666, 1),
    "llada": (None, 126336, 0),
    "mmada": (None, 126336, 0),
    "fast_dllm": (32, 151665, 1),
    "llada_moe": (None, 156895, 0),
    "llada2": (32, 156895, 0),
    "dream_reasoner": (32, 151669, 0),
}


def test_block_size_and_mask_token(published, tmp_path):
    expected = DEFAULTS[published.name]
    source = write_config(published, tmp_path / "source", block_size=None, bd_size=None, mask_token_id=None)
    config = AutoConfig.from_pretrained(source)
    assert (config.block_size, config.mask_token_id, config.logit_shift) == expected
    assert config.diffusion_attention == ("full" if expected[0] is None else "block")
    if expected[0] is not None:
        model = AutoModelForCausalLM.from_pretrained(source, block_size=16)
        assert model.config.block_size == 16
        model.save_pretrained(tmp_path / "saved")
        assert AutoConfig.from_pretrained(tmp_path / "saved").block_size == 16


def test_unknown_architecture(published, tmp_path):
    source = write_config(published, tmp_path / "source", architectures=["NoSuchVisionModel"])
    names = [*read_config(published)["architectures"], *NAMESAKES.get(read_config(published)["model_type"], {})]
    for name in names:
        with pytest.raises(ValueError, match=rf"\['NoSuchVisionModel'\].*Known: .*{name}"):
            AutoModelForCausalLM.from_pretrained(source)


@pytest.mark.parametrize(
    "family, setting",
    [
        ("llada", "block_type"),
        ("mmada", "rope"),
        ("llada_moe", "qk_layernorm"),
        ("llada_moe", "clip_qkv"),
        ("llada_moe", "partial_rotary_factor"),
        ("llada2", "score_function"),
        ("llada2", "use_bias"),
    ],
)
def test_what_public_code_could_build_but_nobody_published(golden_dir, tmp_path, family, setting):
    source = write_config(golden_dir / family, tmp_path / "source", **{setting: 0.5})
    with pytest.raises(ValueError, match=f"`{setting}=0.5` is not supported"):
        AutoConfig.from_pretrained(source)


def test_fused_projection_with_bias(golden_dir, tmp_path):
    config = AutoConfig.from_pretrained(golden_dir / "llada2", use_qkv_bias=True)
    model = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for kind, shape in (("weight", (128, 64)), ("bias", (128,))):  # 4 heads and twice 2 of 16
        assert saved[f"model.layers.1.attention.query_key_value.{kind}"].shape == shape
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


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


@pytest.mark.parametrize("family", ["sdar_moe", "llada_moe", "llada2"])
def test_experts_run_together(golden_dir, family):
    model = AutoModelForCausalLM.from_pretrained(golden_dir / family)
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
