"""The model families. A family is one file; one line here registers it."""

from dllm_trl._compat import register_lazy_configs, register_lazy_tokenizers


# Model type in the published config.json -> its config class. The file is imported when a checkpoint asks for it.
FAMILIES = {
    "sdar": "dllm_trl.modeling.sdar:SDARConfig",
    "sdar_moe": "dllm_trl.modeling.sdar:SDARMoeConfig",
    "Dream": "dllm_trl.modeling.dream:DreamConfig",
    "llada": "dllm_trl.modeling.llada:LLaDAConfig",
    "mmada": "dllm_trl.modeling.mmada:MMadaConfig",
    "Fast_dLLM_Qwen": "dllm_trl.modeling.fast_dllm:Fast_dLLM_QwenConfig",
    "llada2_moe": "dllm_trl.modeling.llada2:LLaDA2MoeConfig",
}
# Families that share the model type of another one: what their config.json has in `architectures` -> config class.
NAMESAKES = {
    "Dream": {"DreamForCausalLM": "dllm_trl.modeling.dream_reasoner:DreamReasonerConfig"},
    "llada": {"LLaDAMoEModelLM": "dllm_trl.modeling.llada_moe:LLaDAMoEConfig"},
}
# Critics of these namesakes -> what `NAMESAKES` has for them. `register_family` adds those of all families.
CRITICS = {"DreamReasonerForTokenClassification": "DreamForCausalLM"}
CRITICS |= {"LLaDAMoEForTokenClassification": "LLaDAMoEModelLM"}

register_lazy_configs(FAMILIES, NAMESAKES, CRITICS)
# What a published tokenizer_config.json calls a class that transformers does not have
register_lazy_tokenizers({"DreamTokenizer": "dllm_trl.modeling.dream_tokenizer:DreamTokenizer"})
