from .diffusion_grpo_trainer import DiffusionGRPOTrainer
from .papers import PAPERS
from .tracerl_config import TraceRLConfig


class TraceRLTrainer(DiffusionGRPOTrainer):
    r"""
    Trainer for TraceRL, introduced in the paper [Revolutionizing Reinforcement Learning Framework for Diffusion Large
    Language Models](https://huggingface.co/papers/2509.06949): every response token is scored once, in the context in
    which the rollout committed it.

    Example:

    ```python
    from datasets import load_dataset
    from dllm_trl import TraceRLTrainer
    from dllm_trl.rewards import math_reward

    trainer = TraceRLTrainer(
        model="Gen-Verse/TraDo-4B-Instruct",
        reward_funcs=math_reward,
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```

    Args:
        objective (`str` or [`Objective`], *optional*):
            Replaces the rounds of TraceRL. By default they replay the rollout, with `args.shrink`.
        model, reward_funcs, args and all others:
            As in [`DiffusionGRPOTrainer`]. `args` is a [`TraceRLConfig`].
    """

    _tag_names = ["trl", "dllm-trl", "tracerl"]
    _name = "TraceRL"
    _paper = PAPERS["trace"]
    config_class = TraceRLConfig
