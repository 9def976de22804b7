"""`import dllm_trl` is quick, and what is slow comes when it is used."""

import subprocess
import sys

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import dllm_trl
from dllm_trl import modeling
from dllm_trl._compat import load_class


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_lazy():
    slow = ["torch.distributed.checkpoint", "transformers.modeling_utils", "trl", "datasets", "peft", "accelerate"]
    code = f"import sys, dllm_trl; print([name for name in {slow} if name in sys.modules])"
    assert run(code) == "[]"


def test_import_time():
    # CPU seconds, so that other processes on the machine don't count.
    def seconds(module):
        return min(float(run(f"import {module}, time; print(time.process_time())")) for _ in range(2))

    assert seconds("dllm_trl") - seconds("transformers") < 3


def test_families_are_registered_without_importing_them():
    code = """
import sys, dllm_trl
from transformers import AutoConfig, AutoModelForCausalLM
assert "dllm_trl.modeling.sdar" not in sys.modules
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("sdar", vocab_size=8, hidden_size=8, head_dim=4,
    intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, mask_token_id=7))
print(type(model).__name__, type(model).__module__)
"""
    assert run(code) == "SDARForCausalLM dllm_trl.modeling.sdar"


FILES = {  # every published folder and the one family file that it takes
    "sdar": "sdar",
    "sdar_moe": "sdar",
    "dream": "dream",
    "llada": "llada",
    "mmada": "mmada",
    "fast_dllm": "fast_dllm",
    "llada_moe": "llada_moe",
    "llada2": "llada2",
    "dream_reasoner": "dream_reasoner",
}


def test_every_family_is_here():
    paths = {*modeling.FAMILIES.values(), *(path for paths in modeling.NAMESAKES.values() for path in paths.values())}
    assert {path.split(":")[0].split(".")[-1] for path in paths} == set(FILES.values())


def test_every_model_type_has_its_config():
    for model_type, path in modeling.FAMILIES.items():
        assert type(AutoConfig.for_model(model_type)) is load_class(path)
    assert {load_class(path) for path in modeling.FAMILIES.values()} <= set(CONFIG_MAPPING.values())
    code = "import dllm_trl; from transformers import AutoConfig; print(type(AutoConfig.for_model('llada')).__name__)"
    assert run(code) == "LLaDAConfig"


def test_no_family_imports_another(published_folder):
    # A process for each family, forked before any of them is imported.
    folders = {folder: str(published_folder(folder)) for folder in FILES}
    code = f"""
import os, sys, dllm_trl.modeling.base
from transformers import AutoModel, AutoModelForCausalLM
for name, folder in {folders}.items():
    if os.fork() == 0:
        for auto_class in (AutoModelForCausalLM, AutoModel):
            auto_class.from_pretrained(folder)
        print(name, *[file for file in {sorted(set(FILES.values()))} if f"dllm_trl.modeling.{{file}}" in sys.modules])
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""
    assert run(code).splitlines() == [f"{folder} {file}" for folder, file in FILES.items()]


def test_every_exported_name_exists():
    for name in dllm_trl.__all__:
        assert getattr(dllm_trl, name).__name__ == name
        assert name in dir(dllm_trl)
    with pytest.raises(AttributeError, match="NoSuchTrainer"):
        dllm_trl.NoSuchTrainer  # noqa: B018
