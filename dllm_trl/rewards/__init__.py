from .format import format_reward
from .math import math_reward
from .speed import speed_reward


__all__ = ["format_reward", "math_reward", "speed_reward"]
