"""Sudoku of 4 x 4, made on the spot: a task on which a tiny model does not reach the top."""

import itertools
import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dllm_trl import DiffusionGenerationConfig


PAD, END, MASK, UNKNOWN = "<|pad|>", "<|end|>", "<|MASK|>", "<|unk|>"
SIGNS = "1234.="
BLANKS = (8, 11)  # cells that a puzzle leaves open


def _units() -> list[list[int]]:
    rows = [[4 * r + c for c in range(4)] for r in range(4)]
    columns = [[4 * r + c for r in range(4)] for c in range(4)]
    boxes = [[4 * (r + i) + c + j for i in range(2) for j in range(2)] for r in (0, 2) for c in (0, 2)]
    return rows + columns + boxes


UNITS = _units()


def is_solution(grid: str) -> bool:
    """Whether every row, column and box of 16 digits holds 1, 2, 3 and 4."""
    return len(grid) == 16 and all({grid[cell] for cell in unit} == set("1234") for unit in UNITS)


def solved_grids() -> list[str]:
    """All 288 solutions."""
    lines = ["".join(p) for p in itertools.permutations("1234")]
    candidates = ("".join(four) for four in itertools.product(lines, repeat=4))
    return [grid for grid in candidates if is_solution(grid)]


def make_puzzles(split: str, size: int, seed: int = 0, careless: float = 0.0) -> Dataset:
    """
    Puzzles: `prompt` (16 cells and `=`), `completion` (16 digits), `puzzle` (the cells). No solved grid is in two
    splits. That share of the completions is `careless`: 1 and 2 are exchanged in the cells that were open.
    """
    grids = solved_grids()
    random.Random(0).shuffle(grids)
    apart = {"validation": grids[:40], "heldout": grids[40:88], "train": grids[88:]}[split]
    rng = random.Random(f"{split} {seed}")
    rows = []
    for _ in range(size):
        grid, open_cells = rng.choice(apart), set(rng.sample(range(16), rng.randint(*BLANKS)))
        puzzle = "".join("." if cell in open_cells else digit for cell, digit in enumerate(grid))
        slip = {"1": "2", "2": "1"} if rng.random() < careless else {}
        written = "".join(slip.get(digit, digit) if cell in open_cells else digit for cell, digit in enumerate(grid))
        rows.append({"prompt": puzzle + "=", "completion": written, "puzzle": puzzle})
    return Dataset.from_list(rows)


def sudoku_reward(completions: list[str], puzzle: list[str], **kwargs) -> list[float]:
    """1 for a grid that solves the puzzle, 0 for all else. A puzzle may have several solutions."""
    return [
        float(is_solution(grid) and all(given in (".", cell) for given, cell in zip(cells, grid, strict=True)))
        for grid, cells in zip(completions, puzzle, strict=True)
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate([PAD, END, MASK, UNKNOWN, *SIGNS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": PAD, "eos_token": END, "mask_token": MASK, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    """SDAR with random weights, as small as the demo's."""
    config = AutoConfig.for_model(
        "sdar",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.06,
        block_size=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        mask_token_id=tokenizer.mask_token_id,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = DiffusionGenerationConfig(
        max_new_tokens=20,
        do_sample=False,
        remasking_strategy="low_confidence_dynamic",
        confidence_threshold=0.9,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model
