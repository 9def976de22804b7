"""
Makes a small SDAR model with random weights around a real tokenizer: enough to see that a recipe runs on your data and
your machine before the real model is downloaded. It can't do mathematics.

    python recipes/random_model.py --tokenizer JetLM/SDAR-1.7B-Chat --output_dir runs/random-sdar
"""

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import has_file

from dllm_trl import DiffusionGenerationConfig


def make_random_model(tokenizer_name: str, output_dir: str, hidden_size: int = 64, num_layers: int = 2, seed: int = 0):
    """Saves model and tokenizer in `output_dir`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    if tokenizer.mask_token_id is None:
        raise ValueError(f"`tokenizer={tokenizer_name!r}` has no mask token. Take the one of a diffusion model.")
    config = AutoConfig.for_model(
        "sdar",
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if has_file(tokenizer_name, "generation_config.json"):  # its EOS ids and its decoding
        model.generation_config = DiffusionGenerationConfig.from_pretrained(tokenizer_name)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="Tokenizer of a diffusion model: Hub name or folder.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_random_model(args.tokenizer, args.output_dir, args.hidden_size, args.num_layers, args.seed)
