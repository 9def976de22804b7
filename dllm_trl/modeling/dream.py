"""Dream, DiffuCoder and Dream-Coder: Qwen2 with full attention and a shifted head. Weight names are Qwen2's."""

from typing import Any

from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from dllm_trl.modeling.base import (
    DiffusionBackboneMixin,
    DiffusionCausalLMMixin,
    DiffusionConfigMixin,
    register_family,
)


# What the published generation_config.json says under `alg`, and ours
ALGORITHMS = {
    "origin": "random",
    "maskgit_plus": "low_confidence_static",
    "topk_margin": "margin",
    "entropy": "entropy",
}


class DreamConfig(DiffusionConfigMixin, Qwen2Config):
    model_type = "Dream"
    diffusion_attention = "full"
    logit_shift = 1
    generation_defaults = {"remasking_strategy": "entropy", "denoising_schedule": "dream"}
    generation_synonyms = ({"alg", "remasking_strategy"}, {"steps", "denoising_steps"})

    mask_token_id: int | None = 151666
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643

    def translate_generation(self, values: dict[str, Any]) -> dict[str, Any]:
        # `eps` is a parameter of the "dream" schedule by its own name, `alg_temp` one of ours
        translated = {}
        if "alg" in values and "remasking_strategy" not in values:
            if values["alg"] not in ALGORITHMS:
                raise ValueError(
                    f"`alg` in generation_config.json must be one of {sorted(ALGORITHMS)}, but is {values['alg']!r}; "
                    "set `remasking_strategy`, which wins."
                )
            translated["remasking_strategy"] = ALGORITHMS[values["alg"]]
        if "steps" in values and "denoising_steps" not in values:
            # The total of the response. A block of n tokens has at most n steps that commit something
            length = max(values.get("max_new_tokens") or values.get("max_length") or 1, 1)
            width = min(values.get("block_length") or length, length)
            per_block = -(-values["steps"] // -(-length // width))
            if per_block < width:
                translated["denoising_steps"] = per_block
        return values | translated


class DreamBackbone(DiffusionBackboneMixin, Qwen2Model):
    config: DreamConfig


class DreamModel(DiffusionCausalLMMixin, Qwen2ForCausalLM):
    """The published class of this name has the head, too."""

    config: DreamConfig
    backbone_class = DreamBackbone


register_family(DreamConfig, DreamModel, DreamModel)
