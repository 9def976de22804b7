"""MMaDA's text side: LLaDA with the codes of an image tokenizer in its vocabulary, which text never holds."""

from transformers.models.llama.modeling_llama import LlamaForCausalLM

from dllm_trl._compat import register_weight_names
from dllm_trl.modeling.base import DiffusionCausalLMMixin, register_family
from dllm_trl.modeling.llada_like import WEIGHT_NAMES, LLaDABackbone, LLaDALikeConfig


class MMadaConfig(LLaDALikeConfig):
    model_type = "mmada"
    attribute_map = {**LLaDALikeConfig.attribute_map, "new_vocab_size": "vocab_size"}

    llm_vocab_size: int = 126464
    codebook_size: int = 8192

    @property
    def suppressed_token_ids(self) -> range:
        """Ids that no text holds, so that none is ever sampled: the image codes. Tokens added after them are text."""
        return range(self.llm_vocab_size, min(self.llm_vocab_size + self.codebook_size, self.vocab_size))


class MMadaModelLM(DiffusionCausalLMMixin, LlamaForCausalLM):
    config: MMadaConfig
    backbone_class = LLaDABackbone


register_weight_names("mmada", WEIGHT_NAMES)
register_family(MMadaConfig, MMadaModelLM, MMadaModelLM)
