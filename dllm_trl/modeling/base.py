"""What every family shares: the config, the backbone that knows the family's attention, the model with its head."""

import copy
import os
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.generic import is_flash_attention_requested

from dllm_trl._compat import load_class, register_lora_targets, share_weight_names
from dllm_trl.generation import DiffusionGenerationMixin
from dllm_trl.modeling import CRITICS, FAMILIES, NAMESAKES
from dllm_trl.modeling.masks import SDPA_PLAN, adapt_mask, block_causal_mask, pad_free_positions
from dllm_trl.modeling.plans import ChunkedPlan
from dllm_trl.modeling.recompute import LARGE, keep_products, without_reentrant
from dllm_trl.modeling.value_head import make_critic_class


# Config class -> names its published config.json may have in `architectures`.
ARCHITECTURES: dict[type[PreTrainedConfig], list[str]] = {}


def register_family(
    config_class: type[PreTrainedConfig], auto_model: type[PreTrainedModel], causal_lm: type[PreTrainedModel]
) -> None:
    """
    Make a family known to the Auto classes: one of this package, or one of your own with a `model_type` of its own or
    (told apart by `architectures`) that of a family here. `AutoModelForTokenClassification` gives its critic, which
    is made on the way.

    Args:
        config_class (`type[PreTrainedConfig]`):
            Config of the family.
        auto_model (`type[PreTrainedModel]`):
            What the published `auto_map` names as `AutoModel`.
        causal_lm (`type[PreTrainedModel]`):
            Model with its head, which `AutoModelForCausalLM` gives.
    """
    model_type, path = config_class.model_type, f"{config_class.__module__}:{config_class.__name__}"
    if FAMILIES.get(model_type, path) == path:
        AutoConfig.register(model_type, config_class)
    else:
        NAMESAKES.setdefault(model_type, {}).update({model.__name__: path for model in (auto_model, causal_lm)})
    AutoModel.register(config_class, auto_model)
    AutoModelForCausalLM.register(config_class, causal_lm)
    critic = make_critic_class(config_class, causal_lm, (_ImplementationMixin,))
    AutoModelForTokenClassification.register(config_class, critic)
    share_weight_names(causal_lm.__name__, critic.__name__)
    CRITICS[critic.__name__] = causal_lm.__name__
    # A tokenizer_config.json whose `auto_map` names a class nobody knows: its tokenizer.json, instead of remote code
    AutoTokenizer.register(config_class, tokenizer_class=PreTrainedTokenizerFast)
    ARCHITECTURES[config_class] = sorted({auto_model.__name__, causal_lm.__name__})


def check_diffusion_model(model: torch.nn.Module) -> None:
    """Raise a `ValueError` that says what is wrong, unless `model` (or what PEFT wraps) is ours, with its head."""
    wrapped = getattr(getattr(model, "base_model", None), "model", None)  # where a PeftModel keeps the model
    if isinstance(model, DiffusionCausalLMMixin) or isinstance(wrapped, DiffusionCausalLMMixin):
        return
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    problem = "has no language model head" if isinstance(model, DiffusionBackboneMixin) else "is none of them"
    raise ValueError(
        f"This needs a diffusion language model of a known family ({', '.join(FAMILIES)}), but "
        f"`{type(model).__name__}` of model type `{model_type}` {problem}. Load a checkpoint of one of these families "
        "with `AutoModelForCausalLM.from_pretrained` after `import dllm_trl`."
    )


class DiffusionConfigMixin:
    r"""
    Reads a published `config.json` and writes it back so that the public code still reads it right.

    Args:
        block_size (`int`):
            Tokens denoised together. Each family declares it with its default where it has blocks.
        mask_token_id (`int`):
            The mask token. Each family declares it with its default.
    """

    diffusion_attention: ClassVar[Literal["block", "full"]] = "block"
    logit_shift: ClassVar[int] = 0  # 1: position i - 1 predicts token i
    generation_defaults: ClassVar[dict[str, Any]] = {}  # how the family decodes where nobody says otherwise
    # Names of generation_config.json that say one thing, ours among them: those of the highest source count
    generation_synonyms: ClassVar[tuple[set[str], ...]] = ()
    block_size = None
    suppressed_token_ids: ClassVar[Iterable[int]] = ()  # never sampled
    auto_map: ClassVar[dict[str, str]] = {}  # TRL reads it from every config

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # transformers' own table of published names: read under the left name, stored under the right one.
        cls.attribute_map = {"torch_dtype": "dtype", **cls.attribute_map}
        if cls.diffusion_attention == "full":
            cls.is_causal = False  # transformers then makes masks of padding only

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        config_dict = copy.deepcopy(config_dict)
        known, given = ARCHITECTURES.get(cls), config_dict.get("architectures")
        given = [CRITICS.get(name, name) for name in given or ()]
        if known and given and not set(given) & set(known):
            namesakes = NAMESAKES.get(cls.model_type, {})
            for name in given:
                if name in namesakes:
                    return load_class(namesakes[name]).from_dict(config_dict, **kwargs)
            raise ValueError(
                f"`architectures` {given} of model type `{cls.model_type}` is unknown. Known: "
                f"{', '.join([*known, *namesakes])}."
            )
        # Published files select FlexAttention here. Whoever loads the model selects, so it is only kept for saving.
        config_dict["published_attn_implementation"] = config_dict.pop("attn_implementation", None)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        # Under the right name before the stock class derives others from them
        for published in self.attribute_map.keys() & kwargs.keys():
            setattr(self, published, kwargs.pop(published))
        super().__post_init__(**kwargs)

    def translate_generation(self, values: dict[str, Any]) -> dict[str, Any]:
        """
        Parameters of generation in our words, where the family's published generation_config.json has others: `values`
        are what call, checkpoint and library say together, and of names that say one thing only one is there.
        """
        return values

    def to_dict(self) -> dict[str, Any]:
        # PEFT reads a config like this right before it looks for default target modules.
        register_lora_targets(self.model_type, ["q_proj", "v_proj"])
        output = super().to_dict()
        output.pop("published_attn_implementation", None)
        if self.diffusion_attention == "full":
            output.pop("is_causal", None)  # a forward leaves the value of the class in the instance
        # transformers 4 knows only these names, and takes theta 10000 where it does not find its own.
        rope = dict(output.pop("rope_parameters"))
        output["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            output["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        output["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        stock = output.copy()
        for published, stored in self.attribute_map.items():
            output.pop(stored, None)
            output[published] = stock[stored]
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        output = super().to_diff_dict()
        if getattr(self, "published_attn_implementation", None) is not None:
            output["attn_implementation"] = self.published_attn_implementation
        return output


def _broken_weights(folder: str | os.PathLike) -> str:
    """Names of the files in a folder that are not whole, with their verb."""
    broken = []
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            broken.append(f"`{file.name}`")
    return f"{', '.join(broken)} is" if broken else "a file is"


class _ImplementationMixin:
    """Which kernels a model runs on."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"The weights of `{pretrained_model_name_or_path}` cannot be read ({error}): "
                f"{_broken_weights(pretrained_model_name_or_path)} cut off or no safetensors file. Copy or download "
                "it again."
            ) from error

    def _check_and_adjust_attn_implementation(self, *args, **kwargs) -> str:
        implementation = super()._check_and_adjust_attn_implementation(*args, **kwargs)
        return SDPA_PLAN if implementation == "sdpa" else implementation

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks into the source file of the class, and without an answer runs expert after expert.
        stock = next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))
        return stock._can_set_experts_implementation()


# Of the published forwards. Swallowed, they would change nothing
_PUBLISHED_ARGUMENTS = {
    "store_kv": "`past_key_values` are always extended. Pass a copy (`copy.deepcopy`) to leave them as they are",
    "update_past_key_values": "`past_key_values` are always extended. Pass a copy (`copy.deepcopy`) to leave them as "
    "they are",
    "replace_position": 'decode with `model.generate(..., cache="dual")`, which replaces keys and values in its cache',
    "use_block_cache": "decode with `model.generate`, which keeps its own cache",
    "block_past_key_values": "decode with `model.generate`, which keeps its own cache",
    "block_size": "use `block_length`",
    "attention_bias": "pass a boolean `attention_mask` of shape (batch, 1, queries, keys)",
}


class DiffusionBackboneMixin(_ImplementationMixin):
    """Puts a family's attention in front of a stock transformers decoder. Mixed in before the decoder's class."""

    def _apply(self, fn, recurse: bool = True):
        # `model.to(torch.bfloat16)` leaves the rotary frequencies in float32, as `from_pretrained(dtype=...)` does:
        # rounded, a far token's angle is off by whole turns, and the saved model computes other logits when loaded.
        exact = dict(self.rotary_emb.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self.rotary_emb.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self.rotary_emb, name, buffer.to(moved.device))
        return self

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        *,
        block_length: int | None = None,
        plan=None,
        score_index: torch.LongTensor | None = None,
        embedding_noise: torch.FloatTensor | None = None,
        **kwargs,
    ):
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Tokens.
            attention_mask (`torch.Tensor`, *optional*):
                `None` or `(B, K)` with K = past + S, 1 for tokens and 0 for padding: the family's own attention.
                `(B, 1, S, K)`, boolean, `True` = may attend: replaces it, in every attention implementation.
                `{"full_attention": mask}`: prepared for the attention implementation, passed on.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Positions without padding, which also say where blocks begin. Counted from a 2D mask by default.
            past_key_values (`Cache`, *optional*):
                Committed tokens.
            inputs_embeds (`torch.Tensor` of shape `(B, S, H)`, *optional*):
                In place of `input_ids`.
            use_cache (`bool`, *optional*):
                Whether to return a cache.
            block_length (`int`, *optional*):
                Tokens per block, in place of the config's `block_size`.
            plan ([`AttentionPlan`] or [`ChunkedPlan`], *optional*):
                Who attends to whom in a packed sequence; replaces `attention_mask`.
            score_index (`torch.LongTensor` of shape `(n,)`, *optional*):
                Positions among the `B * S` tokens whose hidden states are wanted. `last_hidden_state` becomes `(1, n,
                H)`, so that a head projects only those.
            embedding_noise (`torch.FloatTensor` of shape `(B, S, H)`, *optional*):
                Added to the embeddings.
        """
        for name in _PUBLISHED_ARGUMENTS.keys() & kwargs.keys():
            raise ValueError(
                f"`{name}` is an argument of the published code, not of this forward: {_PUBLISHED_ARGUMENTS[name]}."
            )
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim not in (2, 4):
            raise ValueError(
                "`attention_mask` must have shape (batch, tokens), 1 for tokens and 0 for padding, or (batch, 1, "
                f"queries, keys), `True` where a query may attend, but has {tuple(attention_mask.shape)}."
            )
        if isinstance(plan, ChunkedPlan):
            return self._forward_chunks(
                plan, input_ids, position_ids, score_index, embedding_noise, use_cache=False, **kwargs
            )
        if inputs_embeds is None:
            inputs_embeds, input_ids = self.embed_tokens(input_ids), None
        if embedding_noise is not None:
            inputs_embeds = inputs_embeds + embedding_noise.to(inputs_embeds.dtype)
        length, past = inputs_embeds.shape[1], 0 if past_key_values is None else past_key_values.get_seq_length()
        padding = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if padding and attention_mask.shape[1] < past + length:
            raise ValueError(
                f"A 2D `attention_mask` covers the cached tokens too: {past} + {length} columns, but it has "
                f"{attention_mask.shape[1]}."
            )
        if position_ids is None and plan is not None:
            raise ValueError("A `plan` needs `position_ids`: packed tokens are not numbered by where they are.")
        if position_ids is None and padding:
            position_ids = pad_free_positions(attention_mask)[:, past : past + length]
        elif position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device)[None] + past

        if self.config.diffusion_attention == "full":
            kwargs.setdefault("is_causal", False)
        if plan is not None and self.config._attn_implementation == SDPA_PLAN:
            # The decoder hands any 4D mask on as it is; the attention function goes by the plan.
            kwargs["plan"], mask = plan, inputs_embeds.new_ones(1, 1, 1, 1, dtype=torch.bool)
        else:
            is_causal = kwargs.get("is_causal", True)
            mask = self._mask(
                inputs_embeds, attention_mask, position_ids, past_key_values, block_length, plan, is_causal
            )
        # The rounds of many responses at once are long: without checkpointing, at least keep no more than is worth it
        large = "plan" in kwargs and inputs_embeds.numel() >= LARGE
        light = large and self.training and torch.is_grad_enabled() and not self.gradient_checkpointing
        with keep_products(self.layers) if light else nullcontext():
            outputs = super().forward(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        if score_index is not None:
            outputs.last_hidden_state = outputs.last_hidden_state.flatten(0, 1)[score_index][None]
        return outputs

    def _forward_chunks(self, plan, input_ids, position_ids, score_index, embedding_noise, **kwargs):
        """Chunk after chunk. If there are several, each keeps nothing for the backward pass but its input."""
        pieces = input_ids.split(plan.tokens, dim=1), position_ids.split(plan.tokens, dim=1)
        starts = accumulate(plan.tokens[:-1], initial=0)
        noises = [None] * len(plan.tokens)
        if embedding_noise is not None:
            noises = embedding_noise.split(plan.tokens, dim=1)
        outputs, several = [], torch.distributed.is_initialized()
        recomputed = torch.is_grad_enabled() and len(plan.plans) > 1
        for ids, positions, read, start, part, noise in zip(
            *pieces, score_index.split(plan.reads), starts, plan.plans, noises, strict=True
        ):

            def run(_, arguments=(ids, None, positions), plan=part, read=read - start, noise=noise):
                with without_reentrant(self.layers) if recomputed and several else nullcontext():
                    output = self.forward(*arguments, plan=plan, score_index=read, embedding_noise=noise, **kwargs)
                return output.last_hidden_state, *(getattr(output, "router_logits", None) or ())

            if recomputed:
                # The reentrant kind leaves not even the nodes of a graph behind, but fires the hooks of a parameter
                # once per chunk, which those that average gradients over processes do not expect
                anchor = torch.zeros(1, device=ids.device, requires_grad=True)  # says whose random state to restore
                outputs.append(checkpoint(run, anchor, use_reentrant=not several))
            else:
                outputs.append(run(None))
        hidden, *routers = zip(*outputs, strict=True)
        result = MoeModelOutputWithPast(last_hidden_state=torch.cat(hidden, dim=1))
        if routers:
            result.router_logits = tuple(torch.cat(layer) for layer in routers)
        return result

    def _mask(self, inputs_embeds, attention_mask, position_ids, past_key_values, block_length, plan, is_causal):
        """The mask in the form that the stock decoder hands on to its layers."""
        implementation, dtype, batch_size = self.config._attn_implementation, inputs_embeds.dtype, len(inputs_embeds)
        if plan is not None:
            if implementation == "flex_attention":
                return plan.block_mask(inputs_embeds.device)
            attention_mask = plan.dense().to(inputs_embeds.device)
        prepared = isinstance(attention_mask, dict)
        if prepared:
            attention_mask = attention_mask["full_attention"]
        elif is_flash_attention_requested(requested_attention_implementation=implementation):
            # Flash attention knows padding and causal or not. A caller who knows that every query may see every key
            # (one canvas over a committed cache) says is_causal=False.
            if is_causal or (attention_mask is not None and attention_mask.ndim == 4):
                raise ValueError(
                    f'`attn_implementation="{implementation}"` ignores masks other than causal ones, and this forward '
                    'needs one. Load the model with `attn_implementation="sdpa"` (or "flex_attention" on CUDA), or '
                    'call `model.set_attn_implementation("sdpa")`.'
                )
            return attention_mask
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
            return adapt_mask(attention_mask, implementation, dtype, batch_size)
        if prepared:
            return attention_mask
        if self.config.diffusion_attention == "full":
            return self._full_mask(inputs_embeds, attention_mask, position_ids, past_key_values, is_causal)
        if block_length is None:
            block_length = self.config.block_size
        return block_causal_mask(
            self.config, inputs_embeds, attention_mask, position_ids, past_key_values, block_length
        )

    def _full_mask(self, inputs_embeds, attention_mask, position_ids, past_key_values, is_causal):
        """Everybody sees everybody: the stock decoder's own mask, but for packed documents and causal training."""
        sequences = None
        if attention_mask is None and past_key_values is None:
            sequences = find_packed_sequence_indices(position_ids)
        if sequences is None and not is_causal:
            return attention_mask
        batch, length = inputs_embeds.shape[:2]
        mask = inputs_embeds.new_ones(batch, 1, length, length, dtype=torch.bool)
        if is_causal:
            mask = mask.tril()
        if sequences is not None:
            mask = mask & (sequences[:, None, :, None] == sequences[:, None, None, :])
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, :]
        return adapt_mask(mask, self.config._attn_implementation, inputs_embeds.dtype, batch)


class DiffusionCausalLMMixin(_ImplementationMixin, DiffusionGenerationMixin):
    """A family's backbone with its head. Mixed in before the stock class, whose forward it keeps."""

    backbone_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: PreTrainedConfig):
        # Not the stock class's __init__, which would build the stock backbone first.
        PreTrainedModel.__init__(self, config)
        self.model = self.backbone_class(config)
        # The stock classes' forward reads them from the model, the last three for the load-balancing loss of experts
        for name in ("vocab_size", "router_aux_loss_coef", "num_experts", "num_experts_per_tok"):
            if hasattr(config, name):
                setattr(self, name, getattr(config, name))
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> torch.nn.Embedding:
        # Without these rows the model neither decodes nor loads again, and transformers only warns
        rows = self.config.vocab_size
        for name in ("mask_token_id", "pad_token_id"):
            token = getattr(self.config, name)
            if new_num_tokens is not None and token is not None and new_num_tokens <= token < rows:
                raise ValueError(
                    f"`new_num_tokens={new_num_tokens}` cuts off the row of `config.{name}={token}`. Keep at least "
                    f"{token + 1} tokens, or set `model.config.{name}` to a smaller id first."
                )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
