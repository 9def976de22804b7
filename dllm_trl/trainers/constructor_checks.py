"""Input that a trainer refuses, said before any training step: what is wrong, the argument's name, and what to do."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoConfig, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from trl.trainer.utils import get_callable_name

from ..generation.checks import is_conversation, naming_template
from ..modeling import FAMILIES
from ..modeling.base import DiffusionConfigMixin, check_diffusion_model


logger = get_logger(__name__)

# What a rollout is made with and the loss must know: the field of the trainer's config that says it
SHARED = {
    "temperature": "temperature",
    "block_length": "block_length",
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
    "num_return_sequences": "num_generations",
    "mask_token_id": "model.config.mask_token_id",
}
# A prompt cannot have more tokens than bytes, and a chat template rarely adds more than this.
_TEMPLATE_BYTES = 2048
# What TRL passes to reward functions beside the columns, and columns that it does not pass
_PASSED = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
_NOT_PASSED = {"prompt", "completion", "completion_ids"}
# What our trainers pass to them of each response
_TOLD = {"tokens_per_forward", "num_forward_passes"}


def check_kind(args, config_class: type) -> None:
    """Raises if `args` is no config that `config_class` can be made from: it belongs to another trainer."""
    given = {field.name for field in fields(args)} if isinstance(args, TrainingArguments) else {"no arguments at all"}
    unknown = given - {field.name for field in fields(config_class)}
    if unknown:
        raise TypeError(
            f"`args` must be a `{config_class.__name__}`, but is a `{type(args).__name__}`, which has "
            f"{', '.join(sorted(unknown)[:3])}."
        )


def check_model(model, model_init_kwargs: dict | None, trust_remote_code: bool = False) -> DiffusionConfigMixin:
    """The config of `model`, a model or where to load one from. Raises unless it is a diffusion language model."""
    if not isinstance(model, str):
        try:
            check_diffusion_model(model)
            return model.config
        except ValueError as error:
            raise ValueError(f"`model`: {error}") from None
    names = ("revision", "cache_dir", "token", "subfolder", "trust_remote_code", "use_cache")
    options = {"trust_remote_code": trust_remote_code}
    options |= {k: v for k, v in (model_init_kwargs or {}).items() if k in names}
    config = AutoConfig.from_pretrained(model, **options)
    if not isinstance(config, DiffusionConfigMixin):
        raise ValueError(
            f"`model={model!r}` has model type `{config.model_type}`, which is no diffusion language model. Pass a "
            f"checkpoint of one of: {', '.join(f'`{name}`' for name in FAMILIES)}."
        )
    return config


def check_options(trainer: str, args, reward_funcs, not_supported: dict[str, object]) -> None:
    """Raises if `args` or an argument of the trainer of that name asks for what decoding by diffusion cannot do."""
    if args.use_vllm or args.use_transformers_continuous_batching:
        option = "use_vllm" if args.use_vllm else "use_transformers_continuous_batching"
        raise ValueError(
            f"`{option}=True` decodes left to right and is not supported by `{trainer}`, which has its own decoding "
            f"engine (it shares its weights with the trainer). Set `{option}=False`."
        )
    if not args.ds3_gather_for_generation:
        raise ValueError(
            f"`ds3_gather_for_generation=False` is not supported by `{trainer}`: responses end when they like, so "
            "processes decode different numbers of forwards, and one that gathered weights in each would wait forever "
            "for the others. Leave it `True`; where the whole weights do not fit, use LoRA or fewer `num_slots`."
        )
    if args.cache_implementation is not None:
        raise ValueError(
            f"`cache_implementation` is not supported by `{trainer}`: its engine keeps an exact cache of its own. "
            "Leave it unset."
        )
    for option, value in not_supported.items():
        if value:
            raise ValueError(
                f"`{option}` is not supported by `{trainer}` (yet): what it returns has no step map to learn from. "
                "Leave it unset."
            )
    if (args.generation_kwargs or {}).get("max_time") is not None:
        raise ValueError(
            "`generation_kwargs` must not hold `max_time`: a rollout that ends by the clock cannot be resumed. Lower "
            "`max_completion_length`."
        )
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"`neftune_noise_alpha={args.neftune_noise_alpha}` adds noise to the embeddings that are scored and not "
            f"to those of the rollout, so that `{trainer}` would train another policy than the one that answered. "
            "Leave it unset; it is for `DiffusionSFTTrainer`."
        )
    for option in SHARED.keys() & (args.generation_kwargs or {}).keys():
        raise ValueError(
            f"`generation_kwargs` must not hold `{option}`, which rollout and training share. Set `{SHARED[option]}`."
        )
    for function in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if function is not None and not isinstance(function, str) and not callable(function):
            raise TypeError(f"`reward_funcs` must be functions, models or model names, but holds {function!r}.")


def check_sharding(trainer: str, fsdp_version: int | None) -> None:
    """Raises if the model is sharded in a way in which its weights cannot be gathered for a whole rollout."""
    if fsdp_version == 1:
        raise ValueError(
            f"`fsdp_version: 1` is not supported by `{trainer}`: each forward gathers weights, but processes "
            "decode different numbers of forwards. Set `fsdp_version: 2`, as `recipes/accelerate/fsdp2.yaml` does, or "
            "use DeepSpeed ZeRO."
        )


def check_attention(config, args, objective) -> None:
    """Raises if a cache or an objective is not made for the model's kind of attention."""
    kind = config.diffusion_attention
    caches = {"block": (None, "exact"), "full": (None, "none", "prefix", "dual")}[kind]
    if args.cache not in caches:
        known = ", ".join(repr(cache) for cache in caches[1:])
        raise ValueError(
            f"`cache={args.cache!r}` is not for `{config.model_type}`, which has {kind} attention. Leave it unset, or "
            f"choose one of: {known}."
        )
    kinds = objective.attentions
    if kind not in kinds:
        raise ValueError(
            f"`objective` is for {' and '.join(kinds)} attention, but `{config.model_type}` has {kind} attention."
        )


def check_beta(args, objective) -> None:
    """Raises if a KL term is wanted of an objective that has none."""
    if args.beta and not objective.has_kl:
        raise ValueError(
            f"`beta={args.beta}` would have no effect: the loss of `objective` ({type(objective).__name__}) has no KL "
            "term. Set `beta=0.0`, or use another objective."
        )


def check_router_loss(config, args) -> None:
    """Raises if a load-balancing loss is wanted of experts that have none (LLaDA2 balances them by a bias)."""
    kwargs = args.gradient_checkpointing_kwargs or {}
    has_experts = hasattr(config, "output_router_logits") and args.router_aux_loss_coef != 0
    if has_experts and args.gradient_checkpointing and kwargs.get("use_reentrant"):
        raise ValueError(
            "`gradient_checkpointing_kwargs={'use_reentrant': True}` leaves the load-balancing loss of the experts "
            "without a gradient. Set `use_reentrant` to `False`, or `router_aux_loss_coef=0.0`."
        )
    balanced = hasattr(config, "router_aux_loss_coef") or not hasattr(config, "output_router_logits")
    if args.router_aux_loss_coef and not balanced:
        raise ValueError(
            f"`router_aux_loss_coef={args.router_aux_loss_coef}`, but `{config.model_type}` has no load-balancing "
            "loss. Leave `router_aux_loss_coef` unset."
        )


def check_precision(args) -> None:
    """Raises if half precision is wanted of a device that would go on in single precision without a word."""
    for name in ("fp16", "fp16_full_eval"):
        if getattr(args, name) and args.device.type == "cpu":
            raise ValueError(
                f"`{name}=True` has no effect on a CPU. Set `{name}=False`; `{name.replace('fp16', 'bf16')}=True` "
                "works there."
            )


def check_peft(model, peft_config) -> None:
    """Raises if `peft_config`, or an adapter that `model` has already, works with virtual tokens."""
    wrapped = not isinstance(model, str) and is_peft_model(model)
    adapters = list(model.peft_config.values()) if wrapped else []
    for name, config in [("peft_config", peft_config), *(("model", adapter) for adapter in adapters)]:
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"`{name}` has a `{type(config).__name__}`, which adds virtual tokens: the block grid does not know "
                "them. Use LoRA or another method that changes weights."
            )


def fill_task_type(model, peft_config) -> None:
    """Says in every adapter's config that it is one of a causal model: `AutoPeftModelForCausalLM` wants to read it."""
    wrapped = not isinstance(model, str) and is_peft_model(model)
    adapters = list(model.peft_config.values()) if wrapped else []
    for config in [peft_config, *adapters]:
        if config is not None and config.task_type is None:
            config.task_type = "CAUSAL_LM"


def check_dataset(name: str, dataset) -> None:
    """Raises if `dataset` is no dataset, or has no rows."""
    if not isinstance(dataset, Dataset | IterableDataset | TorchDataset):
        raise TypeError(
            f"`{name}` must be a `datasets.Dataset` or `IterableDataset`, but is a `{type(dataset).__name__}`: make "
            "one with `Dataset.from_list` or `load_dataset`."
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"`{name}` has no rows. Was everything filtered out?")


def check_prompt_column(name: str, dataset) -> None:
    """Raises if a dataset (or one of a dict of them) is known to lack the column `prompt`."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_prompt_column(f"{name}[{key!r}]", part)
        return
    if dataset is not None:
        check_dataset(name, dataset)
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"`{name}` has no column `prompt`, only {list(columns)}. Rename the column that holds the prompts: "
            f"`{name}.rename_column(..., 'prompt')`."
        )


def check_reward_columns(reward_funcs, name: str, dataset) -> None:
    """
    Raises if a dataset (or one of a dict of them) is known to lack a column that a reward function demands, or to have
    one under a name that the rollout's own numbers take.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_reward_columns(reward_funcs, f"{name}[{key!r}]", part)
        return
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    if taken := sorted(_TOLD.intersection(columns)):
        raise ValueError(
            f"`{name}` has the columns {taken}, but under these names reward functions get the rollout's numbers. "
            f"Rename them: `{name}.rename_column(...)`."
        )
    given = (set(columns) - _NOT_PASSED) | _PASSED | _TOLD
    for function in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if not callable(function) or isinstance(function, nn.Module):
            continue
        parameters = inspect.signature(function).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        missing = [p.name for p in parameters if p.kind in kinds and p.default is p.empty and p.name not in given]
        if missing:
            raise ValueError(
                f"The reward function `{get_callable_name(function)}` needs {missing}, but `{name}` has only the "
                f"columns {list(columns)}. Rename the column that holds it, or give the argument a default."
            )


def check_prompts(
    name: str,
    dataset,
    tokenize: Callable[[list], list[list[int]]],
    limit: int | None,
    mask: str | None,
    mask_token_id: int,
) -> None:
    """
    Raises if a prompt of a map-style dataset is neither text nor messages, empty, longer than `limit` tokens, or
    spells the `mask`. The first is tokenized, and those that might be wrong; those of an iterable dataset are checked
    when their turn comes.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_prompts(f"{name}[{key!r}]", part, tokenize, limit, mask, mask_token_id)
        return
    if not isinstance(dataset, Dataset):
        return
    suspects, prompts = [], []
    for index, prompt in enumerate(dataset["prompt"]):
        if not prompt:
            raise ValueError(
                f"`{name}[{index}]['prompt']` is empty: there is nothing to condition on. Filter such rows out: "
                f"`{name}.filter(lambda row: row['prompt'])`."
            )
        if not isinstance(prompt, str) and not is_conversation(prompt):
            raise ValueError(
                f"`{name}[{index}]['prompt']` must be text or a list of messages, each with `role` and `content`, but "
                f"is {prompt!r:.80}. Mend such rows, or filter them out."
            )
        if index == 0:
            with naming_template("processing_class"):
                tokenize([prompt])
        text = prompt if isinstance(prompt, str) else str(prompt)
        long = limit is not None and len(text.encode()) + _TEMPLATE_BYTES > limit
        if long or (mask and mask in text):
            suspects.append(index)
            prompts.append(prompt)
    for start in range(0, len(prompts), 256):
        tokenized = tokenize(prompts[start : start + 256])
        for index, ids in zip(suspects[start : start + 256], tokenized, strict=True):
            if len(ids) == 0:
                raise ValueError(f"`{name}[{index}]['prompt']` has no tokens. Filter such rows out.")
            if mask_token_id in ids:
                raise ValueError(
                    f"`{name}[{index}]['prompt']` holds the mask token {mask!r} (id {mask_token_id}), which stands "
                    "for what is not decoded yet, and a rollout does not fill it. Filter such rows out: "
                    f"`{name}.filter(lambda row: {mask!r} not in str(row['prompt']))`."
                )
            if limit is not None and len(ids) > limit:
                raise ValueError(
                    f"`{name}[{index}]['prompt']` has {len(ids)} tokens, but the model's context leaves room for "
                    f"{limit} besides `max_completion_length`. Filter long prompts out, or lower "
                    "`max_completion_length`."
                )


def check_enough_prompts(dataset, args) -> None:
    """Raises if a map-style dataset cannot fill one generation batch: TRL drops the rest, which here is everything."""
    needed = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} prompts, but one generation batch takes {needed} "
            f"(`generation_batch_size={args.generation_batch_size}`, `num_generations={args.num_generations}`): "
            "no step would be taken. Add prompts, or lower `generation_batch_size`, `steps_per_generation` or "
            "`per_device_train_batch_size`."
        )


def check_context(trainer) -> None:
    """Raises if `max_completion_length`, or a prompt with it, does not fit into the model's context."""
    limit = trainer.model.config.max_position_embeddings - trainer.max_completion_length
    if limit < 1:
        raise ValueError(
            f"`max_completion_length={trainer.max_completion_length}` fills the model's context of "
            f"{trainer.model.config.max_position_embeddings} tokens. Lower it."
        )
    for name in ("train_dataset", "eval_dataset"):
        if getattr(trainer, name) is not None:
            check_prompts(
                name,
                getattr(trainer, name),
                lambda prompts: trainer._tokenize_prompts(prompts)[0],
                limit,
                trainer._tokenizer.convert_ids_to_tokens(trainer.mask_token_id),
                trainer.mask_token_id,
            )


def find_mask_token(config, tokenizer) -> int:
    """Id of the mask token, from the model's config or else from the tokenizer. Raises if there is none."""
    mask_token_id = config.mask_token_id
    if mask_token_id is None:
        mask_token_id = tokenizer.mask_token_id
    if mask_token_id is None:
        raise ValueError(
            "Neither the model's config nor `processing_class` names a mask token. Set `model.config.mask_token_id` "
            "to the id the model was trained with, or `processing_class.mask_token`."
        )
    if not 0 <= mask_token_id < config.vocab_size:
        raise ValueError(
            f"The mask token has id {mask_token_id}, but the model's vocabulary has {config.vocab_size} tokens. Set "
            "`model.config.mask_token_id` to the id the model was trained with."
        )
    return mask_token_id


def check_eos(processing_class: Any, eos_token: str | None = None) -> None:
    """Raises for a tokenizer without EOS, from which no response could learn to end. `eos_token` is the config's."""
    if not isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin | None):
        raise TypeError(
            f"`processing_class` must be a tokenizer, but is {processing_class!r:.80}: load it with "
            "`AutoTokenizer.from_pretrained`."
        )
    tokenizer = getattr(processing_class, "tokenizer", processing_class)  # a processor has one
    if tokenizer is not None and eos_token is None and tokenizer.eos_token is None:
        raise ValueError(
            "`processing_class` has no EOS token, so that no response can end. Set `processing_class.eos_token` to "
            "the token that ends a response in this model's format."
        )
