"""`import dllm_trl` is quick, and what is slow comes when it is used."""

import subprocess
import sys

import pytest

import dllm_trl


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


def test_every_exported_name_exists():
    for name in dllm_trl.__all__:
        assert getattr(dllm_trl, name).__name__ == name
        assert name in dir(dllm_trl)
    with pytest.raises(AttributeError, match="NoSuchTrainer"):
        dllm_trl.NoSuchTrainer  # noqa: B018
