"""What the trainers of this package refuse, which of TRL's tests ask for it, and what they are then told."""

import re
from typing import NamedTuple


class Refusal(NamedTuple):
    """
    Args:
        feature (`str`):
            What is refused, and why: a line of `docs/trl_compatibility.md`.
        tests (`str`):
            Pattern of the names of TRL's tests that ask for it.
        says (`str`):
            Pattern of what those tests fail with. One that fails with anything else is a failure.
    """

    feature: str
    tests: str
    says: str


REFUSED = [
    Refusal(
        "vLLM: the trainer has its own decoding engine, which shares its weights",
        r"vllm",
        r"use_vllm=True` decodes left to right",
    ),
    Refusal(
        "continuous batching of transformers: it decodes left to right",
        r"with_transformers_continuous_batching",
        r"use_transformers_continuous_batching=True` decodes left to right",
    ),
    Refusal(
        "beam search: it is not defined for tokens that are committed in parallel",
        r"TestGRPO.*test_train_with_generation_kwargs$",
        r"Beam search is not defined",
    ),
    Refusal(
        "tools and environments: what comes from them has no step map to learn from, yet",
        r"TestGRPO.*(tools|tool_calls|environments|environment_)",
        r"`(tools|environment_factory)` is not supported",
    ),
    Refusal(
        "rollout functions: what they return has no step map to learn from",
        r"prefers_rollout_func|rollout_func_syncs",
        r"`rollout_func` is not supported",
    ),
    Refusal(
        "prompt tuning, prefix tuning and p-tuning: the block grid does not know virtual tokens",
        r"prompt_tuning|prompt_learning",
        r"adds virtual tokens",
    ),
    Refusal(
        "vision-language models: the families here read text",
        r"(?i)vlm|-ForConditionalGeneration",
        r"is no diffusion language model",
    ),
    Refusal(
        "options that nothing here would read (`pad_to_multiple_of`, Liger, `torch_compile`): refused, not ignored",
        r"pad_to_multiple_of|liger|torch_compile",
        r"would have no effect",
    ),
]


def listed(test: str) -> Refusal | None:
    """The refused feature that a test asks for, if any."""
    return next((refusal for refusal in REFUSED if re.search(refusal.tests, test)), None)


def refusal(test: str, message: str) -> Refusal | None:
    """The refusal that made a test fail with `message`, if one did."""
    found = listed(test)
    return found if found is not None and re.search(found.says, message) else None
