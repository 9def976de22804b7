"""The only place that knows how transformers, PEFT and TRL keep things inside, version by version."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType


# Everything private, or imported from the inside, that this package touches: owner -> names; of a method that is
# overridden with its arguments. tests/test_compat.py holds it to the installed versions and to the code.
TOUCHED = {
    "trl:GRPOConfig": ("_VALID_DICT_FIELDS",),
    "trl:GRPOTrainer": (
        "_buffered_inputs",
        "_calculate_rewards(inputs, prompts, completions, completion_ids_list)",
        "_compute_loss(model, inputs)",
        "_dist",
        "_generate_and_score_completions(inputs)",
        "_generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)",
        "_get_per_token_logps_and_entropies",
        "_get_train_sampler(dataset)",
        "_load_optimizer_and_scheduler(checkpoint)",
        "_logs",
        "_metrics",
        "_name",
        "_paper",
        "_prepare_inputs(generation_batch)",
        "_save_checkpoint(model, trial)",
        "_step",
        "_tag_names",
        "_tokenize_prompts(prompts)",
        "_tokenizer",
        "_total_train_tokens",
    ),
    "trl:SFTTrainer": (
        "_metrics",
        "_name",
        "_paper",
        "_prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)",
        "_prepare_inputs(inputs)",
        "_set_signature_columns_if_needed()",
        "_signature_columns",
        "_tag_names",
        "_tokenizer",
        "_total_train_tokens",
    ),
    "trl.chat_template_utils": ("has_generation_markers",),
    "trl.data_utils": ("get_dataset_column_names",),
    "trl.extras.profiling": ("profiling_context", "profiling_decorator"),
    "trl.models": ("unwrap_model_for_generation",),
    "trl.models.utils": ("disable_gradient_checkpointing",),
    "trl.trainer": ("grpo_trainer", "utils"),
    "trl.trainer.grpo_trainer": ("create_model_from_path",),
    "trl.trainer.utils": (
        "_CHUNKED_LOGPROB_CHUNK_SIZE",
        "RepeatSampler",
        "get_callable_name",
        "get_config_model_id",
        "is_async_callable",
        "use_adapter",
    ),
    "transformers:Trainer": (
        "_get_output_dir(trial)",
        "_initial_global_step",
        "_load_best_model()",
        "_load_from_checkpoint(resume_from_checkpoint, model)",
        "_load_optimizer_and_scheduler(checkpoint)",
        "_load_rng_state(checkpoint)",
        "_save_checkpoint(model, trial)",
        "_save_optimizer_and_scheduler(output_dir)",
        "_save_rng_state(output_dir)",
        "get_batch_samples(epoch_iterator, num_batches, device)",
        "save_model(output_dir, _internal_call)",
    ),
    "transformers:GenerationConfig": ("_get_default_generation_params()", "_original_object_hash"),
    "transformers:PreTrainedConfig": ("_attn_implementation",),
    "transformers:PreTrainedModel": (
        "_can_set_experts_implementation()",
        "_init_weights(module)",
        "_keep_in_fp32_modules_strict",
        "_check_and_adjust_attn_implementation(attn_implementation, is_init_check, allow_all_kernels)",
        "_keys_to_ignore_on_load_unexpected",
    ),
    "transformers:PreTrainedTokenizerFast": (
        "_save_pretrained(save_directory, file_names, legacy_format, filename_prefix)",
    ),
    "transformers.conversion_mapping": (
        "get_checkpoint_conversion_mapping",
        "register_checkpoint_conversion_mapping",
    ),
    "transformers.core_model_loading": ("Split", "WeightConverter", "WeightRenaming"),
    "transformers.integrations.sdpa_attention": ("repeat_kv", "sdpa_attention_forward"),
    "transformers.masking_utils": (
        "ALL_MASK_ATTENTION_FUNCTIONS",
        "create_causal_mask",
        "find_packed_sequence_indices",
        "sdpa_mask",
    ),
    "transformers.modeling_layers": ("_gradient_checkpointing_func",),
    "transformers.modeling_outputs": ("MoeModelOutputWithPast", "TokenClassifierOutput"),
    "transformers.modeling_utils": ("ALL_ATTENTION_FUNCTIONS",),
    "transformers.models.auto": ("tokenization_auto",),
    "transformers.models.auto.configuration_auto:CONFIG_MAPPING": ("_extra_content",),
    "transformers.models.auto.tokenization_auto": ("REGISTERED_TOKENIZER_CLASSES",),
    "transformers.models.llama": ("modeling_llama",),
    "transformers.trainer": ("OPTIMIZER_NAME", "SCHEDULER_NAME", "TRAINER_STATE_NAME"),
    "transformers.trainer_utils": ("PREFIX_CHECKPOINT_DIR", "has_length"),
    "transformers.utils": (
        "ADAPTER_SAFE_WEIGHTS_NAME",
        "ADAPTER_WEIGHTS_NAME",
        "GENERATION_CONFIG_NAME",
        "ModelOutput",
        "SAFE_WEIGHTS_INDEX_NAME",
        "SAFE_WEIGHTS_NAME",
        "WEIGHTS_INDEX_NAME",
        "WEIGHTS_NAME",
        "cached_file",
    ),
    "transformers.utils.generic": ("is_flash_attention_requested",),
    "peft.tuners.tuners_utils": ("BaseTunerLayer", "cast_adapter_dtype"),
    "peft.utils": ("ModulesToSaveWrapper",),
    "peft.utils.constants": ("TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",),
    "accelerate.hooks": ("_hf_hook",),
    "torch:Tensor": ("_version",),
    "torch.distributed.fsdp:FSDPModule": ("_get_fsdp_state",),
    "torch.distributed.fsdp._fully_shard._fsdp_common": ("TrainingState",),
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState": ("_modules_to_run_forward", "_training_state"),
    "torch.nn:Module": (
        "_apply(fn, recurse)",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    ),
    "torch.ops.mkldnn": ("_linear_pointwise", "_reorder_linear_weight"),
}


def load_class(path: str) -> type:
    """The class of a path `"module:Class"`."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


class _LazyClasses(dict):
    """`{name: class or "module:Class"}` that imports a class the first time it is asked for."""

    namesakes: dict[str, dict[str, str]] = {}
    critics: dict[str, str] = {}

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if isinstance(value, str) and key in self.namesakes:
            return _dispatcher(value, self.namesakes[key], self.critics)
        if isinstance(value, str):
            value = self[key] = load_class(value)
        return value

    def values(self):
        return [value for _, value in self.items()]

    def items(self):
        return [(key, load_class(value) if isinstance(value, str) else value) for key, value in super().items()]


def _dispatcher(path: str, namesakes: dict[str, str], critics: dict[str, str]) -> type:
    """Stands for the config class at `path` until `architectures` says whether it is that one or a namesake."""

    class Dispatcher:
        def __new__(cls, *args, **kwargs):
            return load_class(path)(*args, **kwargs)

        @staticmethod
        def from_dict(config_dict, **kwargs):
            architectures = [critics.get(name, name) for name in config_dict.get("architectures") or []]
            paths = [namesakes[name] for name in architectures if name in namesakes]
            return load_class(paths[0] if paths else path).from_dict(config_dict, **kwargs)

    return Dispatcher


def register_lazy_configs(
    families: dict[str, str], namesakes: dict[str, dict[str, str]], critics: dict[str, str]
) -> None:
    """
    Teach `AutoConfig` model types without importing their modules.

    `AutoConfig.register` takes a class, and importing one model class costs seconds. Every way to one of our models
    begins by looking up its model type here, which imports the family's file, which registers its classes the ordinary
    way.

    Args:
        families (`dict[str, str]`):
            Model type -> `"module:ConfigClass"`.
        namesakes (`dict[str, dict[str, str]]`):
            Model type -> entry of `architectures` -> `"module:ConfigClass"`, of other families with that model type.
        critics (`dict[str, str]`):
            Name of a critic in `architectures` -> that of the language model of its family.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING._extra_content = _LazyClasses({**CONFIG_MAPPING._extra_content, **families})
    CONFIG_MAPPING._extra_content.namesakes = namesakes
    CONFIG_MAPPING._extra_content.critics = critics


def register_lazy_tokenizers(tokenizers: dict[str, str]) -> None:
    """
    Teach `AutoTokenizer` what `tokenizer_class` in a published tokenizer_config.json means, so that an `auto_map`
    beside it asks for no remote code.

    Args:
        tokenizers (`dict[str, str]`):
            Name -> `"module:TokenizerClass"`, imported when a folder asks for it.
    """
    from transformers.models.auto import tokenization_auto

    registered = tokenization_auto.REGISTERED_TOKENIZER_CLASSES
    tokenization_auto.REGISTERED_TOKENIZER_CLASSES = _LazyClasses({**registered, **tokenizers})


def register_weight_names(
    model_type: str, names: dict[str, str], like: str | None = None, split: dict[str, list[str]] | None = None
) -> None:
    """
    Load and save `model_type`'s weights under other names than those in memory.

    Args:
        model_type (`str`):
            Model type in the published config.json, or the name of a model class, which wins over the model type.
        names (`dict[str, str]`):
            Regular expression of the published name, with at most one group -> name in memory, with `\\1` for it.
        like (`str`, *optional*):
            Model type whose conversions in transformers apply, too.
        split (`dict[str, list[str]]`, *optional*):
            Module whose weight is stored in one piece, under its renamed name -> the modules that share it in memory,
            in this order.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

    conversions = [WeightRenaming(published, ours) for published, ours in names.items()]
    for fused, parts in (split or {}).items():
        # The weight and the bias, where there is one
        for kind in ("weight", "bias"):
            targets = [f"{part}.{kind}" for part in parts]
            conversions.append(WeightConverter(f"{fused}.{kind}", targets, operations=[Split(dim=0)]))
    if like is not None:
        conversions += get_checkpoint_conversion_mapping(like)
    register_checkpoint_conversion_mapping(model_type, conversions, overwrite=True)


def share_weight_names(class_name: str, other: str) -> None:
    """Load and save the class `other` under the names that were registered for the class `class_name`, if any."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    conversions = get_checkpoint_conversion_mapping(class_name)
    if conversions is not None:
        register_checkpoint_conversion_mapping(other, conversions, overwrite=True)


def rebound(function: Callable, **names) -> Callable:
    """`function` over again, with other objects behind some of the global names that its body uses."""
    again = FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__)
    again.__defaults__, again.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return again


def register_lora_targets(model_type: str, target_modules: list[str]) -> None:
    """Give PEFT the LoRA modules of a model type it does not know. Does nothing as long as nobody imported PEFT."""
    if "peft" in sys.modules:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as defaults

        defaults.setdefault(model_type, target_modules)


def offloaded_to(module: "nn.Module") -> "torch.device | None":  # noqa: F821
    """Where accelerate's hooks bring the weights of `module` for a forward, `None` without such hooks."""
    import torch

    for part in module.modules():  # an adapter wraps the module that has the hook
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):  # several in a row
            if getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    return None


def take_mixed_adapters(model: "nn.Module") -> list[str] | None:  # noqa: F821
    """
    The `adapter_names` of the `PeftModel.generate` that is running. PEFT moves the argument into hooks, and leaves
    them there when an error comes out of `generate`, so they are taken off.
    """
    names = None
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if "adapter_names" in getattr(hook, "keywords", {}):
                names = hook.keywords["adapter_names"]
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return names


def use_small_logprob_tiles(device_type: str) -> None:
    """
    Make TRL's fused head work on tiles that fit a CPU: twice as fast there, and an eighth of the memory.

    The head projects 4096 tokens onto 32768 vocabulary entries at a time, half a gigabyte per temporary in float32.
    That suits a GPU, so it is left alone there. The result is the same.
    """
    if device_type == "cpu":
        from trl.trainer import utils

        utils._CHUNKED_LOGPROB_CHUNK_SIZE = 2048


@contextmanager
def idle_fsdp_hooks(modules: list) -> Iterator[None]:
    """
    The forward hooks of `modules` of FSDP2 neither gather nor free weights. They still cast what a mixed precision
    policy says.

    In the state set here a module is called once more during the backward pass, by activation checkpointing, and FSDP
    leaves its weights to the hooks of that pass.
    """
    states = {id(state): state for state in (module._get_fsdp_state() for module in modules)}.values()
    if not states:
        yield
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    before = [state._training_state for state in states]
    for state in states:
        state._training_state = TrainingState.PRE_BACKWARD
    try:
        yield
    finally:
        for state, earlier in zip(states, before):
            state._training_state = earlier
            state._modules_to_run_forward.clear()  # of modules that share a state, some may have been called alone


@contextmanager
def making_reference(make: Callable) -> Iterator[None]:
    """While a `GRPOTrainer` is built around a model in memory: `make()` gives its reference model."""
    from trl.trainer import grpo_trainer

    original, grpo_trainer.create_model_from_path = grpo_trainer.create_model_from_path, lambda *_, **__: make()
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = original


def writable_parameters(model, is_zero3: bool):
    """Context in which a model's parameters can be filled from a whole state dict also where DeepSpeed parts them."""
    if not is_zero3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)
