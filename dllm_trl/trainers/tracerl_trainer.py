from torch import nn

from .diffusion_grpo_trainer import DiffusionGRPOTrainer
from .tracerl_config import TraceRLConfig
from .value_model import ValueModelMixin


class TraceRLTrainer(ValueModelMixin, DiffusionGRPOTrainer):
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
        value_model (`str`, `bool` or `nn.Module`, *optional*):
            Critic: as `args.value_model`, which it wins over, or a module whose `forward` takes what the policy's
            takes and gives `logits` of one number per position, such as one loaded with
            `AutoModelForTokenClassification`. `True` is `"copy"`.
        model, reward_funcs, args and all others:
            As in [`DiffusionGRPOTrainer`]. `args` is a [`TraceRLConfig`].
    """

    _tag_names = ["trl", "dllm-trl", "tracerl"]
    _name = "TraceRL"
    config_class = TraceRLConfig

    def __init__(self, *args, value_model: str | bool | nn.Module | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        value_model = self.args.value_model if value_model is None else value_model
        if value_model:
            self._add_value_model(value_model)
        elif self.args.value_warmup_updates:
            raise ValueError(
                f"`value_warmup_updates={self.args.value_warmup_updates}`, but there is no critic to warm up. Set "
                '`value_model`, e.g. to `"copy"`, or `value_warmup_updates=0`.'
            )
