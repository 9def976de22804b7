"""
Offline stand-ins for what TRL's tests load from the Hub: datasets, tokenizers and tiny models of the same names and
formats, made on the spot in one folder. A test that runs in that folder finds `"trl-internal-testing/zen"` there.
"""

import codecs
import contextlib
import importlib
import inspect
import io
import json
import re
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset, Image
from PIL import Image as PILImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

import dllm_trl  # noqa: F401  (registers the families)


OWNER = "trl-internal-testing"
PAD, START, END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"
OTHER_TOKENS = ["<|finetune_right_pad_id|>", "<think>", "</think>"]
# The ids that these have in Qwen's tokenizer, and what the tests load that write them out, or that need a vocabulary
# in which EOS is never hit by chance
QWEN_IDS = {PAD: 151643, START: 151644, END: 151645}
WIDE_NAMES = {"zen", "tiny-Qwen2ForCausalLM-2.5", "tiny-Qwen2ForSequenceClassification-2.5"}
TEMPLATE_DONOR = "Qwen/Qwen3-4B"  # a chat template is copied from it
NO_CHAT_TEMPLATE = ("GPTNeoX",)
CHAT_TEMPLATE = (
    "{% if model_identity %}<|im_start|>system\n{{ model_identity }} {{ reasoning_effort }}<|im_end|>\n{% endif %}"
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['thinking'] %}<think>{{ message['thinking'] }}</think>{% endif %}"
    "{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}"
    "<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# ------------------------------------------------------------------------------------------------------------ datasets

TEST_ROWS = 2
# Words of each line of the Zen of Python that are the prompt; TRL's tests name the first twelve prompts
PROMPT_WORDS = (4, 2, 3, 1, 4, 3, 1, 4, 3, 3, 2, 6, 5, 4, 3, 4, 4, 4, 2)


def zen_lines() -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()):
        text = codecs.decode(importlib.import_module("this").s, "rot13")
    return text.strip().splitlines()[2:]


def _cut(line: str, words: int) -> tuple[str, str]:
    parts = line.split(" ")
    return " ".join(parts[:words]), " " + " ".join(parts[words:])


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def zen() -> dict[str, list[dict]]:
    """Configurations of the dataset and their rows."""
    lines = zen_lines()
    pairs = [_cut(line, words) for line, words in zip(lines, PROMPT_WORDS, strict=True)]
    others = pairs[1:] + pairs[:1]
    return {
        "standard_language_modeling": [{"text": line} for line in lines],
        "standard_prompt_only": [{"prompt": prompt} for prompt, _ in pairs],
        "standard_prompt_completion": [{"prompt": prompt, "completion": rest} for prompt, rest in pairs],
        "standard_implicit_prompt_preference": [
            {"chosen": prompt + rest, "rejected": prompt + wrong}
            for (prompt, rest), (_, wrong) in zip(pairs, others, strict=True)
        ],
        "conversational_language_modeling": [
            {"messages": [_user(f"Continue: {prompt}"), _assistant(rest.strip())]} for prompt, rest in pairs
        ],
        "conversational_prompt_only": [{"prompt": [_user(f"Continue: {prompt}")]} for prompt, _ in pairs],
        "conversational_prompt_completion": [
            {"prompt": [_user(f"Continue: {prompt}")], "completion": [_assistant(rest.strip())]}
            for prompt, rest in pairs
        ],
    }


def harmony() -> dict[str, list[dict]]:
    """Conversations with thoughts and with arguments of the chat template."""
    rows = []
    for number, (line, words) in enumerate(zip(zen_lines(), PROMPT_WORDS, strict=True)):
        prompt, rest = _cut(line, words)
        options = {"reasoning_effort": ("low", "medium", "high")[number % 3], "model_identity": "You are tiny."}
        question = [_user(f"Continue: {prompt}")]
        answer = [_assistant(rest.strip(), thinking=f"It has {len(rest)} characters.")]
        rows.append((question, answer, options))
    return {
        "language_modeling": [{"messages": q + a, "chat_template_kwargs": o} for q, a, o in rows],
        "prompt_completion": [{"prompt": q, "completion": a, "chat_template_kwargs": o} for q, a, o in rows],
    }


def toolcall() -> dict[str, list[dict]]:
    """Conversations that call a function, each with functions of a schema of its own."""
    rows = []
    for number, name in enumerate(("add", "ring", "look_up", "paint", "sleep", "count") * 3):
        parameters = {f"{name}_{i}": {"type": "integer", "description": f"Number {i}."} for i in range(number % 3 + 1)}
        schema = {"name": name, "description": name, "parameters": {"type": "object", "properties": parameters}}
        call = {"type": "function", "function": {"name": name, "arguments": json.dumps(dict.fromkeys(parameters, 1))}}
        messages = [
            _user(f"Please {name}.") | {"tool_calls": None, "name": None},
            _assistant("", tool_calls=[call], name=None),
            {"role": "tool", "name": name, "content": str(number), "tool_calls": None},
            _assistant(f"It is {number}.", tool_calls=None, name=None),
        ]
        rows.append({"messages": messages, "tools": json.dumps([{"type": "function", "function": schema}])})
    return {"language_modeling": rows}


def zen_image() -> dict[str, list[dict]]:
    picture = PILImage.new("RGB", (8, 8))
    rows = []
    for line in zen_lines():
        question = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": line}]}
        rows.append({"messages": [question, answer], "image": picture})
    prompts = [{"prompt": row["messages"][:1], "image": row["image"]} for row in rows]
    return {"conversational_language_modeling": rows, "conversational_prompt_only": prompts}


DATASETS = {"zen": zen, "harmony": harmony, "toolcall": toolcall, "zen-image": zen_image}


def write_dataset(folder: Path, configurations: dict[str, list[dict]]) -> None:
    """A local folder that `load_dataset(folder, configuration)` reads as it reads a dataset of the Hub."""
    card = ["---", "configs:"]
    for name, rows in configurations.items():
        (folder / name).mkdir(parents=True)
        card += [f"- config_name: {name}", "  data_files:"]
        for split, part in (("train", rows[:-TEST_ROWS]), ("test", rows[-TEST_ROWS:])):
            dataset = Dataset.from_list(part)
            if "image" in dataset.column_names:
                dataset = dataset.cast_column("image", Image())
            dataset.to_parquet(folder / name / f"{split}.parquet")
            card += [f"  - split: {split}", f"    path: {name}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


# ----------------------------------------------------------------------------------------------- tokenizers and models


def make_tokenizer(wide: bool, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the Zen of Python. `wide` puts the special tokens where Qwen has them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([line for line in zen_lines() for _ in range(3)], trainer)
    state = json.loads(trained.to_str())["model"]
    vocab = dict(state["vocab"])
    fillers = 0
    for token in [PAD, START, END, MASK, *OTHER_TOKENS]:
        while wide and token in QWEN_IDS and len(vocab) < QWEN_IDS[token]:
            vocab[f"<|filler_{fillers}|>"] = len(vocab)
            fillers += 1
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in state["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        mask_token=MASK,
        additional_special_tokens=[START, *OTHER_TOKENS],
        chat_template=chat_template,
        model_max_length=1024,
    )


TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 1024,
}
TINY_EXPERTS = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
}
# What one family needs besides
TINY_MORE = {
    "DeepseekV3": {
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
        "head_dim": 4,
        "num_key_value_heads": 4,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "NemotronH": {
        "layers_block_type": ["mamba", "moe", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
    "GptOss": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
}
MIXTURES = ("Moe", "GptOss", "DeepseekV3", "NemotronH")


def tiny_config(family: str, tokenizer: PreTrainedTokenizerFast, **more) -> PreTrainedConfig:
    """Config of a tiny model of a transformers family, from whatever of `TINY` that family knows."""
    config_class = getattr(transformers, f"{family}Config")
    known = set(inspect.signature(config_class).parameters)
    sizes = TINY | TINY_EXPERTS | TINY_MORE.get(family, {})
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return config_class(**({k: v for k, v in sizes.items() if k in known} | special | more))


def make_causal_lm(family: str, tokenizer: PreTrainedTokenizerFast, diffusion: bool):
    """A tiny model of the family the name says; with `diffusion`, a tiny SDAR instead (its MoE for mixtures)."""
    if not diffusion:
        return AutoModelForCausalLM.from_config(tiny_config(family, tokenizer))
    mixture = any(word in family for word in MIXTURES)
    experts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
    config = AutoConfig.for_model(
        "sdar_moe" if mixture else "sdar",
        **TINY,
        **({name: TINY_EXPERTS[name] for name in experts} if mixture else {}),
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        mask_token_id=tokenizer.mask_token_id,
        block_size=4,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config)


REMOTE_CODE = """
{imports}

class RemoteConfig({config}):
    model_type = "remote"

class RemoteForCausalLM({model}):
    config_class = RemoteConfig
"""


def write_remote(folder: Path, tokenizer: PreTrainedTokenizerFast, diffusion: bool) -> None:
    """A checkpoint whose classes are code in its folder."""
    family, base = ("SDAR", "Qwen3") if diffusion else ("Qwen2", "Qwen2")
    model = make_causal_lm(base, tokenizer, diffusion)
    model.save_pretrained(folder)
    module = "dllm_trl.modeling.sdar" if diffusion else "transformers"
    names = f"{family}Config", f"{family}ForCausalLM"
    code = REMOTE_CODE.format(imports=f"from {module} import {', '.join(names)}", config=names[0], model=names[1])
    (folder / "remote.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "remote",
        "architectures": ["RemoteForCausalLM"],
        "auto_map": {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)


def write_model(folder: Path, name: str, diffusion: bool, wide: bool, seed: int) -> None:
    family, head = re.fullmatch(r"tiny-(\w+?)For(CausalLM|SequenceClassification)(?:-.*)?", name).groups()
    tokenizer = make_tokenizer(wide, None if family in NO_CHAT_TEMPLATE else CHAT_TEMPLATE)
    torch.manual_seed(seed)
    if family == "Remote":
        return write_remote(folder, tokenizer, diffusion)
    if head == "CausalLM":
        model = make_causal_lm(family, tokenizer, diffusion)
    else:
        model = AutoModelForSequenceClassification.from_config(tiny_config(family, tokenizer, num_labels=1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def names_in(tests: list[str]) -> set[str]:
    """What the given sources load by name."""
    return set(re.findall(rf"{OWNER}/([\w.-]+)", "\n".join(tests)))


def write_stand_ins(
    folder: Path, names: set[str], diffusion: bool, wide: bool = False, seed: int = 0
) -> dict[str, str]:
    """Stand-ins for `names` in `folder`. Returns the names that have none, with the reason."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    missing = {}
    for name in sorted(names):
        target = folder / OWNER / name
        if name in DATASETS:
            write_dataset(target, DATASETS[name]())
        elif re.fullmatch(r"tiny-.*For(CausalLM|SequenceClassification).*", name):
            write_model(target, name, diffusion, wide, seed)
        else:
            missing[name] = "reads images" if re.search("image|ConditionalGeneration", name) else "unknown"
    make_tokenizer(wide).save_pretrained(folder / TEMPLATE_DONOR)
    return missing
