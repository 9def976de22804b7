"""Options of TRL's and transformers' configs that nothing here would read: refused by name, with the reason."""

from dataclasses import fields

from trl import GRPOConfig


_VLLM = "there is no vLLM: the trainer has its own decoding engine, which shares its weights"
_COMPILE = "each packed batch has a shape and an attention of its own, which cannot be compiled"
_LIGER = "Liger has no kernels for these families, and the head is fused already"
_SAMPLER = "prompts come from TRL's sampler of groups, which knows only `seed` and `shuffle_dataset`"
_METRICS = "there is no `compute_metrics` in GRPO: rewards are the metrics"

UNREAD = {
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "pad_to_multiple_of": "forwards are packed without padding",
    "use_cache": "a training forward keeps no cache, and a checkpoint says what the loaded one said",
    "label_smoothing_factor": "log-probabilities are computed without full logits",
}
UNREAD_IN_RL = UNREAD | {
    **{field.name: _VLLM for field in fields(GRPOConfig) if field.name.startswith("vllm_")},
    "transformers_continuous_batching_config": "it is for a decoder from left to right",
    "max_tool_calling_iterations": "there are no tools: what they return has no step map to learn from",
    "log_multimodal": "these models read text only",
    "data_seed": _SAMPLER,
    "train_sampling_strategy": _SAMPLER,
    "length_column_name": _SAMPLER,
    "prediction_loss_only": _METRICS,
    "label_names": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "eval_accumulation_steps": _METRICS,
}


def check_unread(trainer: str, args, unread: dict[str, str]) -> None:
    """Raises if a field of `args` that is a key of `unread` has another value than its default."""
    defaults = {field.name: _default(field) for field in fields(args)}
    defaults["pad_to_multiple_of"] = None  # what "auto" becomes
    for name, reason in unread.items():
        value = getattr(args, name)
        if value != defaults[name]:
            raise ValueError(
                f"`{name}={value!r}` would have no effect in `{trainer}`: {reason}. Leave it at {defaults[name]!r}."
            )
    unknown = (getattr(args, "dataset_kwargs", None) or {}).keys() - {"skip_prepare_dataset"}
    if unknown:
        raise ValueError(
            f"`dataset_kwargs` has {', '.join(f'`{name}`' for name in sorted(unknown))}, which would have no effect: "
            "`SFTTrainer` reads `skip_prepare_dataset` only. Leave it out."
        )
    if getattr(args, "activation_offloading", False) and args.device.type == "cpu":
        raise ValueError(
            "`activation_offloading=True` moves activations from an accelerator to the CPU, but there is no "
            "accelerator. Set `activation_offloading=False`."
        )


def _default(field):
    return field.default_factory() if callable(field.default_factory) else field.default
