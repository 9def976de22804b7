"""Dream, DiffuCoder and Dream-Coder: Qwen2 with full attention and a shifted head. Weight names are Qwen2's."""

from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from dllm_trl.modeling.base import (
    DiffusionBackboneMixin,
    DiffusionCausalLMMixin,
    DiffusionConfigMixin,
    register_family,
)


class DreamConfig(DiffusionConfigMixin, Qwen2Config):
    model_type = "Dream"
    diffusion_attention = "full"
    logit_shift = 1
    generation_defaults = {"remasking_strategy": "entropy", "denoising_schedule": "dream"}

    mask_token_id: int | None = 151666
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643


class DreamBackbone(DiffusionBackboneMixin, Qwen2Model):
    config: DreamConfig


class DreamModel(DiffusionCausalLMMixin, Qwen2ForCausalLM):
    """The published class of this name has the head, too."""

    config: DreamConfig
    backbone_class = DreamBackbone


register_family(DreamConfig, DreamModel, DreamModel)
