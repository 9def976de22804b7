"""Models that other libraries changed: weights that accelerate brings when needed, several adapters of PEFT."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from dllm_trl.generation import DiffusionGenerationConfig, generate_rollouts
from tests.trainers.tiny_rl import TINY, make_model


FAMILY = pytest.mark.parametrize("family", TINY)
KW = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
PROMPT = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]])


def embeddings_on_disk(model, tmp_path):
    names = [f"model.{name}" for name, _ in model.base_model.named_children()]
    places = dict.fromkeys([*names, "lm_head"], "cpu")
    embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    dispatch_model(model, places | {embeddings: "disk"}, main_device="cpu", offload_dir=tmp_path, force_hooks=True)


def everything_on_disk(model, tmp_path):
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))


def everything_in_memory(model, tmp_path):
    cpu_offload(model, execution_device=torch.device("cpu"))


@FAMILY
@pytest.mark.parametrize("offload", [everything_in_memory, everything_on_disk, embeddings_on_disk])
def test_offloaded_weights(family, offload, tmp_path):
    model = make_model(family).eval()
    sampling = DiffusionGenerationConfig(**KW | {"do_sample": True, "seed": 0})
    expected = model.generate(PROMPT, **KW)
    rollout = generate_rollouts(model, PROMPT.tolist(), sampling, num_generations=2, num_slots=3)
    offload(model, tmp_path)
    assert model.get_input_embeddings().weight.device.type == "meta"
    assert torch.equal(model.generate(PROMPT, **KW), expected)
    again = generate_rollouts(model, PROMPT.tolist(), sampling, num_generations=2, num_slots=3)
    assert torch.equal(again.canvas_ids, rollout.canvas_ids)
    if model.config.diffusion_attention == "full":
        for cache in ("prefix", "dual"):
            plain = make_model(family).eval().generate(PROMPT, cache=cache, block_length=4, **KW)
            assert torch.equal(model.generate(PROMPT, cache=cache, block_length=4, **KW), plain)


@FAMILY
def test_several_adapters_in_one_batch_are_refused_by_name(family):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(family), config, adapter_name="one")
    model.add_adapter("two", config)
    model.eval()
    for names in (["one", "two"], ["one", "__base__"], ["one", "one"]):
        with pytest.raises(ValueError, match=r"`adapter_names=\['one', .*`model.set_adapter\(name\)`"):
            model.generate(input_ids=PROMPT, adapter_names=names, **KW)
        with pytest.raises(ValueError, match=r"`adapter_names=\['one', .*`model.set_adapter\(name\)`"):
            model.get_base_model().generate(PROMPT, adapter_names=names, **KW)
    # The mend, on a model that the refusal left as it was
    model.set_adapter("two")
    two = model.generate(input_ids=PROMPT, **KW)
    model.set_adapter("one")
    assert not torch.equal(model.generate(input_ids=PROMPT, **KW), two)
