from .format import format_reward
from .math import math_reward


__all__ = ["format_reward", "math_reward"]
