from ._verdicts import judge_vote, parse_verdict
from .chunk_model import chunk_rewards
from .format import format_reward
from .math import math_reward
from .openai_judge import openai_judge
from .process import process_reward
from .speed import speed_reward
from .transformers_judge import transformers_judge


__all__ = [
    "chunk_rewards",
    "format_reward",
    "judge_vote",
    "math_reward",
    "openai_judge",
    "parse_verdict",
    "process_reward",
    "speed_reward",
    "transformers_judge",
]
