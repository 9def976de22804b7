"""
The tables of docs/models.md and docs/objectives.md, made from the code.

    python -m tests.models_table            # prints them
    python -m tests.models_table --write    # puts them into the pages
"""

import sys
from dataclasses import MISSING, fields
from pathlib import Path

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from dllm_trl._compat import load_class
from dllm_trl.generation import DiffusionGenerationMixin
from dllm_trl.modeling import FAMILIES, NAMESAKES
from dllm_trl.objectives import OBJECTIVES, SFT_OBJECTIVES, Objective


DOCS = Path(__file__).parents[1] / "docs"
CACHES = {"block": ["exact"], "full": ["none", "prefix", "dual"]}
# Config class -> what of it is on the Hub. All else in the tables is read off the code
CHECKPOINTS = {
    "SDARConfig": "JetLM/SDAR-1.7B-Chat, -4B-Chat, -8B-Chat (also -b8, -b16, ...); Gen-Verse/TraDo-4B-Instruct, "
    "-8B-Instruct, -8B-Thinking",
    "SDARMoeConfig": "JetLM/SDAR-30B-A3B-Chat",
    "DreamConfig": "Dream-org/Dream-v0-Base-7B, -Instruct-7B; Dream-org/Dream-Coder-v0-Base-7B, -Instruct-7B; "
    "apple/DiffuCoder-7B-Base, -Instruct, -cpGRPO",
    "DreamReasonerConfig": "DreamReasoner",
    "LLaDAConfig": "GSAI-ML/LLaDA-8B-Base, -Instruct; GSAI-ML/LLaDA-1.5",
    "LLaDAMoEConfig": "inclusionAI/LLaDA-MoE-7B-A1B-Base, -Instruct",
    "MMadaConfig": "Gen-Verse/MMaDA-8B-Base, -MixCoT",
    "Fast_dLLM_QwenConfig": "Efficient-Large-Model/Fast_dLLM_v2_1.5B, _7B",
    "LLaDA2MoeConfig": "inclusionAI/LLaDA2.0-mini, -flash",
}


def families() -> list[type[PreTrainedConfig]]:
    """Config class of every family, those that share a model type next to each other."""
    paths = []
    for model_type, path in FAMILIES.items():
        paths += [path, *NAMESAKES.get(model_type, {}).values()]
    return [load_class(path) for path in dict.fromkeys(paths)]


def head_class(config_class: type[PreTrainedConfig]) -> type:
    return AutoModelForCausalLM._model_mapping[config_class]


def takes(objectives: dict, config_class: type[PreTrainedConfig]) -> list[str]:
    """Names of the objectives for the family's kind of attention."""
    kind = config_class.diffusion_attention
    return [name for name, made in objectives.items() if kind in made.attentions]


def _built_on(config_class: type[PreTrainedConfig]) -> str:
    """The transformers model that the family is a subclass of."""
    bases = (base for base in head_class(config_class).__mro__ if base.__module__.startswith("transformers.models."))
    return next(bases).__name__.removesuffix("ForCausalLM")


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _rows(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def facts() -> str:
    """What is published: names, attention, mask token."""
    table = [["`model_type`", "class", "checkpoints", "built on", "attention", "mask token", "reads token i at"]]
    for config_class in families():
        config = config_class(vocab_size=2**18)
        attention = f"blocks of {config.block_size}" if config.diffusion_attention == "block" else "full"
        read = "i - 1" if config.logit_shift else "i"
        name = config_class.__name__
        head = f"`{head_class(config_class).__name__}`"
        built_on = _built_on(config_class)
        mask = str(config.mask_token_id)
        table.append([f"`{config.model_type}`", head, CHECKPOINTS[name], built_on, attention, mask, read])
    return _rows(table)


def capabilities() -> str:
    """What can be done with each family."""
    table = [["class", "load", "save", "`generate`", "`cache`", "SFT objectives", "RL objectives", "LoRA by default"]]
    for config_class in families():
        config_class(vocab_size=2**18).to_dict()  # as PEFT does before it looks for modules: that registers them
        head = head_class(config_class)
        auto = [AutoModelForCausalLM] if AutoModel._model_mapping[config_class] is not head else []
        strategy = config_class.generation_defaults.get("remasking_strategy", "low_confidence_dynamic")
        table.append(
            [
                f"`{head.__name__}`",
                _code([loader.__name__ for loader in auto or [AutoModel, AutoModelForCausalLM]]),
                "published format",
                f"`{strategy}`" if issubclass(head, DiffusionGenerationMixin) else "-",
                _code(CACHES[config_class.diffusion_attention]),
                _code(takes(SFT_OBJECTIVES, config_class)),
                _code(takes(OBJECTIVES, config_class)),
                _code(LORA_TARGETS[config_class.model_type]),
            ]
        )
    return _rows(table)


def objectives() -> str:
    """Which objective trains which family."""
    kinds = sorted(families(), key=lambda config_class: config_class.diffusion_attention)
    table = [["", *(f"`{kind.__name__.removesuffix('Config')}`" for kind in kinds)]]
    table.append(["attention", *(kind.diffusion_attention for kind in kinds)])
    for name, made in OBJECTIVES.items():
        table.append([f"`{name}`", *("yes" if kind.diffusion_attention in made.attentions else "-" for kind in kinds)])
    return _rows(table)


def options() -> str:
    """What an objective takes and reads."""
    table = [["", "`objective_kwargs`, defaults", "ratio to the old policy", "KL term (`beta`)", "loss"]]
    for name, made in OBJECTIVES.items():
        own = [f for f in fields(made) if f.init]
        values = [f"`{f.name}={f.default!r}`" if f.default is not MISSING else f"`{f.name}`" for f in own]
        loss = "`loss_type`" if made.loss is Objective.loss else "its own"
        said = ["yes" if answer else "no" for answer in (made.has_ratio, made.has_kl)]
        table.append([f"`{name}`", ", ".join(values) or "-", *said, loss])
    return _rows(table)


# Page -> its tables
PAGES = {
    DOCS / "models.md": {"facts": facts, "capabilities": capabilities},
    DOCS / "objectives.md": {"objectives": objectives, "options": options},
}


def fill(page: str, tables: dict) -> str:
    """The page with its tables as they should be: each between two comments that name it."""
    for name, make in tables.items():
        begin, end = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
        before, rest = page.split(begin)
        page = before + begin + make() + "\n" + end + rest.split(end)[1]
    return page


if __name__ == "__main__":
    for path, tables in PAGES.items():
        if "--write" in sys.argv[1:]:
            path.write_text(fill(path.read_text(), tables))
        else:
            print("\n\n".join(make() for make in tables.values()), end="\n\n")
