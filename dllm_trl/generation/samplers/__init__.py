"""
One remasking strategy per file. A strategy is a function

    sampler(scores, masked, quota, *, confidence_threshold, entropy_bound) -> commit

that says which masked tokens of each block are committed in this step:

- `scores` ([`TokenScores`]): `confidence`, `entropy`, `margin`, `uniform`, each `(B, W)` float32.
- `masked` `(B, W)` bool: positions still masked.
- `quota` `(B,)` long: tokens the schedule asks for in this step (it may exceed the masked ones).
- `commit` `(B, W)` bool: a subset of `masked`, not empty where the quota is all that is masked.
"""

from .common import TokenScores, checked, top_quota
from .entropy import entropy
from .entropy_bound import entropy_bound
from .low_confidence_dynamic import low_confidence_dynamic
from .low_confidence_static import low_confidence_static
from .margin import margin
from .random import random
from .sequential import sequential


SAMPLERS = {
    "sequential": sequential,
    "low_confidence_static": low_confidence_static,
    "low_confidence_dynamic": low_confidence_dynamic,
    "random": random,
    "entropy": entropy,
    "margin": margin,
    "entropy_bound": entropy_bound,
}

__all__ = ["SAMPLERS", "TokenScores", "checked", "top_quota"]
