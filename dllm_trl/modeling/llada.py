"""LLaDA 8B and 1.5: Llama with full attention, logits in place, under LLaDA's names, rotated in float32."""

from transformers.models.llama.modeling_llama import LlamaForCausalLM

from dllm_trl._compat import register_weight_names
from dllm_trl.modeling.base import DiffusionCausalLMMixin, register_family
from dllm_trl.modeling.llada_like import WEIGHT_NAMES, LLaDABackbone, LLaDALikeConfig


class LLaDAConfig(LLaDALikeConfig):
    model_type = "llada"


class LLaDAModelLM(DiffusionCausalLMMixin, LlamaForCausalLM):
    config: LLaDAConfig
    backbone_class = LLaDABackbone


register_weight_names("llada", WEIGHT_NAMES)
register_family(LLaDAConfig, LLaDAModelLM, LLaDAModelLM)
