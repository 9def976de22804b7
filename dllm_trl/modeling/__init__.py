"""The model families. A family is one file; one line here registers it."""

from dllm_trl._compat import register_lazy_configs


# Model type in the published config.json -> its config class. The file is imported when a checkpoint asks for it.
FAMILIES = {
    "sdar": "dllm_trl.modeling.sdar:SDARConfig",
    "sdar_moe": "dllm_trl.modeling.sdar:SDARMoeConfig",
}

register_lazy_configs(FAMILIES)
