"""Critics: the head, the two ways to make one of a policy, and what is written to disk."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForTokenClassification, LlamaConfig, LlamaForCausalLM

from dllm_trl.modeling.value import adapter_critic, copy_critic, export_critic, load_critic, own_state

from ..trainers.tiny_rl import TINY, make_model


IDS = torch.arange(6, 18)[None]
FAMILIES = pytest.mark.parametrize("family", TINY)
LORA = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


def make_policy(family="sdar", lora=False):
    model = make_model(family).eval()
    if lora:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
    return model


def language_model(policy):
    return policy.get_base_model() if hasattr(policy, "peft_config") else policy


def disturb(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn_like(parameter)


def trainable(critic):
    return [parameter for parameter in critic.parameters() if parameter.requires_grad]


@FAMILIES
def test_a_checkpoint_of_either_kind_is_a_critic(tmp_path, family):
    policy = make_policy(family)
    policy.save_pretrained(tmp_path / "policy")
    critic, info = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "policy", num_labels=1, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"} and not info["unexpected_keys"]
    assert critic.score.bias is None and (critic.score.weight == 0).all()
    assert torch.equal(critic.model(IDS).last_hidden_state, policy.model(IDS).last_hidden_state)
    disturb(critic.parameters())
    critic.save_pretrained(tmp_path / "critic")
    again, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.num_labels == 1 and type(again) is type(critic)
    assert again(IDS).logits.shape == (1, 12, 1) and torch.equal(again(IDS).logits, critic(IDS).logits)


def test_a_namesakes_critic_in_a_fresh_process(tmp_path):
    """Its family is found by `architectures` alone, before anybody has imported it."""
    copy_critic(make_policy("DreamForCausalLM")).save_pretrained(tmp_path)
    code = (
        "import dllm_trl; from transformers import AutoModelForTokenClassification as Auto; "
        f"print(type(Auto.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split()[-1] == "DreamReasonerForTokenClassification"


def test_the_head_stays_in_single_precision(tmp_path):
    copy_critic(make_policy()).save_pretrained(tmp_path)
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert critic.model.norm.weight.dtype == torch.bfloat16 and critic.score.weight.dtype == torch.float32
    critic = adapter_critic(make_policy().to(torch.bfloat16))
    assert {parameter.dtype for parameter in trainable(critic)} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert critic(IDS).logits.dtype == torch.float32


@LORA
@FAMILIES
def test_an_adapter_shares_weights_and_nothing_else(family, lora):
    policy = make_policy(family, lora)
    parameters, names = [*policy.parameters()], [*policy.state_dict()]
    flags = [parameter.requires_grad for parameter in parameters]
    logits = policy(IDS).logits.detach()
    critic = adapter_critic(policy, rank=4).eval()
    # The policy is as it was, module by module, and takes no part in what the critic learns
    assert [*policy.state_dict()] == names and [*map(id, policy.parameters())] == [*map(id, parameters)]
    assert [parameter.requires_grad for parameter in parameters] == flags
    pointers = {parameter.data_ptr() for parameter in parameters}
    extra = {parameter.data_ptr() for parameter in critic.parameters()} - pointers
    assert extra == {parameter.data_ptr() for parameter in trainable(critic)}
    disturb(trainable(critic))
    critic(IDS).logits.sum().backward()
    assert all(parameter.grad is None for parameter in parameters)
    assert all(parameter.grad is not None for parameter in trainable(critic))
    assert torch.equal(policy(IDS).logits, logits)
    # What the policy's optimizer writes is seen; an adapter of the policy's is not
    values = critic(IDS).logits.detach()
    disturb(parameter for name, parameter in policy.named_parameters() if "lora_" in name)
    assert torch.equal(critic(IDS).logits, values)
    disturb(language_model(policy).model.parameters())
    assert not torch.equal(critic(IDS).logits, values)
    # Nor does it matter that either of the two is moved
    values = critic(IDS).logits.detach()
    torch.testing.assert_close(critic.to("cpu:0")(IDS).logits, values)
    language_model(policy).model.to("cpu:0")
    disturb(language_model(policy).model.parameters())
    assert not torch.equal(critic(IDS).logits, values)
    assert {p.data_ptr() for p in critic.parameters()} - {p.data_ptr() for p in policy.parameters()} == {
        p.data_ptr() for p in trainable(critic)
    }


@LORA
@pytest.mark.parametrize("family", ["sdar", "llada", "LLaDAMoEModelLM"])
def test_what_is_exported_is_whole(tmp_path, family, lora):
    policy = make_policy(family, lora)
    for number, critic in enumerate((adapter_critic(policy), copy_critic(policy))):
        disturb(trainable(critic))
        values = critic.eval()(IDS).logits
        export_critic(critic, tmp_path / str(number))
        loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / str(number))
        torch.testing.assert_close(loaded(IDS).logits, values, atol=1e-4, rtol=1e-4)
        assert torch.equal(critic(IDS).logits, values) and len(own_state(critic)) <= len(critic.state_dict())


@LORA
def test_a_copy_begins_as_the_policy_acts(lora):
    policy = make_policy(lora=lora)
    critic = copy_critic(policy).eval()
    hidden = language_model(policy).model(IDS).last_hidden_state
    torch.testing.assert_close(critic.model(IDS).last_hidden_state, hidden, atol=1e-4, rtol=1e-4)
    assert len(trainable(critic)) == len([*critic.parameters()])
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in policy.parameters()}


def test_unfit_checkpoints_are_refused(tmp_path):
    config = make_policy().config
    with pytest.raises(ValueError, match="`value_model='.*nowhere'` is neither"):
        load_critic(str(tmp_path / "nowhere"), config)
    make_policy("llada").save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="has full attention, but the policy has block attention"):
        load_critic(str(tmp_path / "full"), config)
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=60, **tiny)).save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match="has no known attention"):
        load_critic(str(tmp_path / "causal"), config)
    make_model(vocab_size=20).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="knows 20 tokens"):
        load_critic(str(tmp_path / "small"), config)
