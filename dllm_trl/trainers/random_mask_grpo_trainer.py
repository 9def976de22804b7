from .diffusion_grpo_trainer import DiffusionGRPOTrainer
from .random_mask_grpo_config import RandomMaskGRPOConfig


class RandomMaskGRPOTrainer(DiffusionGRPOTrainer):
    r"""
    Trainer on random masks. By default UniGRPO, introduced in the paper [MMaDA: Multimodal Large Diffusion Language
    Models](https://huggingface.co/papers/2505.15809): each update masks another share of the response and scores what
    is masked. With `objective="diffu_grpo"` diffu-GRPO, of the paper [d1: Scaling Reasoning in Diffusion Large
    Language Models via Reinforcement Learning](https://huggingface.co/papers/2504.12216): one pass with the whole
    response masked, and part of the prompt.

    Example:

    ```python
    from datasets import load_dataset
    from dllm_trl import RandomMaskGRPOConfig, RandomMaskGRPOTrainer
    from dllm_trl.rewards import math_reward

    trainer = RandomMaskGRPOTrainer(
        model="GSAI-ML/LLaDA-8B-Instruct",
        reward_funcs=math_reward,
        args=RandomMaskGRPOConfig("llada-math", num_iterations=4),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```

    Args:
        objective (`str` or [`Objective`], *optional*):
            `"random_mask"` or `"diffu_grpo"`, with the options that `args` has for them, or any other. By default
            `args.objective`, and without that `"random_mask"`.
        model, reward_funcs, args and all others:
            As in [`DiffusionGRPOTrainer`]. `args` is a [`RandomMaskGRPOConfig`].
    """

    _tag_names = ["trl", "dllm-trl", "random-mask-grpo"]
    _name = "Random-mask GRPO"
    config_class = RandomMaskGRPOConfig
