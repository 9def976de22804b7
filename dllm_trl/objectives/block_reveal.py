"""JustGRPO in blocks: several tokens of a block are revealed at a time, from left to right."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .just_grpo import JustGRPOObjective


@dataclass
class BlockRevealObjective(JustGRPOObjective):
    """
    As [`JustGRPOObjective`], with `width` tokens of each block per step, of the rollout and of the rounds. A width
    that is not smaller than the block makes it one round.
    """

    attentions: ClassVar[tuple[str, ...]] = ("block",)

    width: int = 2

    def decoding(self, block_length: int) -> dict[str, Any]:
        if self.width < block_length and block_length % self.width:
            raise ValueError(
                f"`width` must divide `block_length`, or not be smaller, but is {self.width} with a `block_length` of "
                f"{block_length}: the steps of a rollout are of equal width."
            )
        return super().decoding(block_length)
