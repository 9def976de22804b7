"""
Critics of a policy: a copy of its backbone, or the backbone itself under an adapter that only the critic has.

The second kind shares weights, not modules: the policy's modules never hear of the critic's adapter.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForTokenClassification, PreTrainedModel

from dllm_trl.modeling.base import DiffusionConfigMixin


ADAPTER_NAME = "value"


def _language_model(policy: nn.Module) -> PreTrainedModel:
    return policy.get_base_model() if is_peft_model(policy) else policy


def _without_adapters(backbone: nn.Module, merge: bool) -> nn.Module:
    """`backbone` with stock modules in place of those that PEFT wraps: as they were, or (`merge`) as they act."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if merge:
                module.merge()
            module = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            active = module.active_adapters
            module = module.modules_to_save[active[0]] if merge and active else module.original_module
        else:
            continue
        backbone.set_submodule(name, module)
    return backbone


def _make_critic(backbone: PreTrainedModel) -> PreTrainedModel:
    """The critic of a family around a backbone of it, with a new head, which is zero."""
    backbone.config.num_labels = 1
    with torch.device("meta"):
        critic = AutoModelForTokenClassification.from_config(backbone.config)
    critic.model, critic.config = backbone, backbone.config
    critic.score = nn.Linear(backbone.config.hidden_size, 1, bias=False, device=backbone.device)
    nn.init.zeros_(critic.score.weight)
    return critic


def copy_critic(policy: nn.Module) -> PreTrainedModel:
    """A critic with a backbone of its own, which begins as that of the policy, its adapter (if any) merged."""
    backbone = copy.deepcopy(_language_model(policy).model)
    if is_peft_model(policy):
        _without_adapters(backbone, merge=True)
    return _make_critic(backbone.requires_grad_(True))


def adapter_critic(policy: nn.Module, rank: int = 16) -> PreTrainedModel:
    r"""
    A critic that sees with the policy's weights, as they are at each moment, through a LoRA adapter and a head of its
    own. Nothing else of it is trained, and no memory is needed for the rest. An adapter of the policy is left out.

    Args:
        policy (`nn.Module`):
            A diffusion language model, a `PeftModel` around one included.
        rank (`int`, *optional*, defaults to `16`):
            Rank of the adapter, whose scale is twice that.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    backbone = _language_model(policy).model
    # In the same memory: what the policy's optimizer writes is seen, and no gradient goes there
    views = [(nn.Parameter(weight.detach(), requires_grad=False), weight) for weight in backbone.parameters()]
    shared = {id(weight): view for view, weight in views} | {id(buffer): buffer for buffer in backbone.buffers()}
    twin = copy.deepcopy(backbone, shared)
    if is_peft_model(policy):
        _without_adapters(twin, merge=False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    inject_adapter_in_model(config, twin, adapter_name=ADAPTER_NAME)
    cast_adapter_dtype(twin, ADAPTER_NAME)  # half precision is too coarse for small updates
    critic = _make_critic(twin)

    def share_weights() -> None:
        for view, weight in views:
            view.data = weight.data  # which is new memory after `model.to(device)`, of the policy or of the critic

    critic.share_weights = share_weights
    return critic


def load_critic(path: str, config: DiffusionConfigMixin, **options: Any) -> PreTrainedModel:
    """
    A critic from a checkpoint: one of a critic, or of a language model, whose head is left out. `config` is the
    policy's, whose kind of attention and vocabulary it must have.
    """
    try:
        own = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f'`value_model={path!r}` is neither "copy" nor "adapter", and no checkpoint is found there: {error}'
        ) from error
    check_critic_config(own, config, path)
    return AutoModelForTokenClassification.from_pretrained(path, num_labels=1, **options)


def check_critic_config(own: Any, config: DiffusionConfigMixin, name: str) -> None:
    """Raises if a critic with the config `own` cannot look at what a policy with `config` looks at."""
    kind = getattr(own, "diffusion_attention", None)
    if kind != config.diffusion_attention:
        raise ValueError(
            f"`value_model` ({name}) has {kind or 'no known'} attention, but the policy has "
            f"{config.diffusion_attention} attention. Choose a critic of the policy's family."
        )
    if own.vocab_size < config.vocab_size:
        raise ValueError(
            f"`value_model` ({name}) knows {own.vocab_size} tokens, but the policy has {config.vocab_size}. Choose a "
            "critic of the policy's family."
        )


def own_state(critic: nn.Module) -> dict[str, torch.Tensor]:
    """The part of a critic's state that is its own: without frozen weights, which an adapter has of the policy."""
    frozen = {name for name, parameter in critic.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in critic.state_dict().items() if name not in frozen}


def load_own_state(critic: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Back from [`own_state`]."""
    if state.keys() != own_state(critic).keys():
        changed = sorted(state.keys() ^ own_state(critic).keys())
        raise ValueError(f"The value model in the checkpoint is another one than `value_model` gives now: {changed}.")
    critic.load_state_dict(state, strict=False)


def export_critic(critic: nn.Module, folder: str | Path) -> None:
    """
    Writes a critic so that `AutoModelForTokenClassification.from_pretrained` loads it: whole, its adapter merged. Of
    the weights only those with an adapter are held twice meanwhile.
    """
    if not isinstance(critic, PreTrainedModel):
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(critic.state_dict(), Path(folder) / "pytorch_model.bin")
        return
    critic.share_weights()
    layers = [module for module in critic.modules() if ADAPTER_NAME in getattr(module, "lora_A", ())]
    shared = {id(tensor): tensor for tensor in (*critic.parameters(), *critic.buffers())}
    for layer in layers:
        shared.pop(id(layer.get_base_layer().weight))
    whole = copy.deepcopy(critic, shared)
    if layers:
        _without_adapters(whole, merge=True)
    whole.save_pretrained(folder)
