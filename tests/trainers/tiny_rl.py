"""A tiny SDAR model, a character tokenizer and prompts, made on the spot: what the trainers' tests run on."""

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dllm_trl._compat import load_class
from dllm_trl.modeling import FAMILIES, NAMESAKES
from dllm_trl.types import Rows


CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +-*/=.,:?!\n"
SPECIAL = ["<pad>", "<eos>", "<mask>", "<unk>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# Punctuation ends a response too, so that some of a random model's responses end early
EOS_IDS = [1] + [len(SPECIAL) + CHARACTERS.index(c) for c in ".,:?!\n"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


# Every family of FAMILIES and NAMESAKES, under its name there (which a test checks).
_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
TINY = {
    "sdar": {**_LLAMA_LIKE, "head_dim": 8, "block_size": 4},
    "sdar_moe": {**_LLAMA_LIKE, "head_dim": 8, "block_size": 4, **_EXPERTS},
    "Dream": _LLAMA_LIKE,
    "llada": {**_LLAMA_LIKE, "num_key_value_heads": 4},
    "mmada": {**_LLAMA_LIKE, "num_key_value_heads": 4, "llm_vocab_size": len(SPECIAL) + len(CHARACTERS)},
    "Fast_dLLM_Qwen": {**_LLAMA_LIKE, "block_size": 4},
    "llada2_moe": {
        **{**_LLAMA_LIKE, "head_dim": 8, "block_size": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        **{"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1, "n_group": 2, "topk_group": 1},
    },
    "DreamForCausalLM": {**_LLAMA_LIKE, "head_dim": 8, "block_size": 4},
    "LLaDAMoEModelLM": {**_LLAMA_LIKE, **_EXPERTS},
}
IMAGE_CODES = {"mmada": 5}  # rows of the vocabulary that no text holds


def config_class(family: str) -> type:
    """The config class of a model type, or of an entry of `architectures` where several share one."""
    return load_class(
        {**FAMILIES, **{key: path for paths in NAMESAKES.values() for key, path in paths.items()}}[family]
    )


# For a trainer's config: on the CPU, quietly, without traces on the disk
ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}

BLOCK = [family for family in TINY if config_class(family).diffusion_attention == "block"]
FULL = [family for family in TINY if config_class(family).diffusion_attention == "full"]


def make_model(family: str = "sdar", seed: int = 0, **overrides):
    """Random weights, large enough that probabilities are far from uniform. Every row of the vocabulary has a
    token."""
    values = {
        **TINY[family],
        "vocab_size": len(SPECIAL) + len(CHARACTERS) + IMAGE_CODES.get(family, 0),
        "mask_token_id": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    config = config_class(family)(**(values | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = EOS_IDS
    return model


def make_prompts(rows: int = 17) -> Dataset:
    """Prompts of 3 to 9 tokens, most of them no multiple of any block length, and the answers to them."""
    return Dataset.from_dict(
        {
            "prompt": [f"{i}+{i % 7}=" + " " * (i % 4) for i in range(rows)],
            "answer": [str(i + i % 7) for i in range(rows)],
        }
    )


def letter_reward(completions, **kwargs) -> list[float]:
    """Share of letters: differs between nearly all responses of a random model."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(map(str.isalpha, text)) / max(len(text), 1) for text in texts]


def chunk_reward(completion_ids, **kwargs) -> list[list[float]]:
    """A number for each chunk of 4 tokens: the share of even ids."""
    chunks = [[ids[k : k + 4] for k in range(0, len(ids), 4)] for ids in completion_ids]
    return [[sum(i % 2 == 0 for i in chunk) / len(chunk) for chunk in one] for one in chunks]


def rows_of(trainer, batch) -> Rows:
    """What a batch of the RL trainer says about its responses."""
    return Rows.from_batch(batch, trainer.grid)


def score(trainer, rows: Rows, view: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies `(B, R)` as the RL trainer computes them."""
    rounds = trainer.objective.rounds(rows, view)
    scores = trainer.scorer(trainer.model, rows, rounds)
    return trainer.objective.reduce(scores.dense("logps"), rounds), scores.mean("entropies")


# Options of objectives whose filters leave nothing of responses as short and as wrong as these
LENIENT = {"lightning_rl": {"slack": 0, "least_range": 0.0, "drop_all_wrong": False}}
