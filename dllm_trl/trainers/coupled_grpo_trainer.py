from .coupled_grpo_config import CoupledGRPOConfig
from .diffusion_grpo_trainer import DiffusionGRPOTrainer


class CoupledGRPOTrainer(DiffusionGRPOTrainer):
    r"""
    Trainer for coupled GRPO, introduced in the paper [DiffuCoder: Understanding and Improving Masked Diffusion Models
    for Code Generation](https://huggingface.co/papers/2506.20639): each random mask of a response goes with its
    complement, so that every token is scored under one of the two.

    Example:

    ```python
    from datasets import load_dataset
    from dllm_trl import CoupledGRPOConfig, CoupledGRPOTrainer
    from dllm_trl.rewards import math_reward

    trainer = CoupledGRPOTrainer(
        model="apple/DiffuCoder-7B-Instruct",
        reward_funcs=math_reward,
        args=CoupledGRPOConfig("diffucoder-math", scale_rewards="leave_one_out", num_iterations=2),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```

    Args:
        objective (`str` or [`Objective`], *optional*):
            Replaces the pairs of masks. By default they are those of `args.estimate`, `args.lower` and `args.upper`.
        model, reward_funcs, args and all others:
            As in [`DiffusionGRPOTrainer`]. `args` is a [`CoupledGRPOConfig`].
    """

    _tag_names = ["trl", "dllm-trl", "coupled-grpo"]
    _name = "Coupled GRPO"
    config_class = CoupledGRPOConfig
