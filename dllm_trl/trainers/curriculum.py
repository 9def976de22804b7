"""Blocks that grow in the course of a run."""

from collections.abc import Mapping, Sequence

from transformers import TrainerCallback

from ..types import Grid


class BlockSizeCurriculum(TrainerCallback):
    r"""
    A callback of [`DiffusionSFTTrainer`] for models with block attention: blocks grow in the course of the run, as in
    4 -> 8 -> 16. The block length of a step is a function of the step and `max_steps` alone, so a resumed run goes on
    as it would have. Evaluations take the one of the last update. `model.config.block_size` follows, so a checkpoint
    decodes with the blocks that it was trained on last.

    Example:

    ```python
    trainer = DiffusionSFTTrainer(
        model="JetLM/SDAR-1.7B-Chat",
        train_dataset=dataset,
        callbacks=[BlockSizeCurriculum([4, 8, 16])],
    )
    ```

    Args:
        schedule (`dict[float, int]` or `list[int]`):
            Share of the run -> block length from there on, such as `{0: 4, 0.25: 8, 0.5: 16}`; or block lengths for
            equally long parts of it.
    """

    def __init__(self, schedule: Mapping[float, int] | Sequence[int]):
        if not isinstance(schedule, Mapping):
            schedule = {i / len(schedule): size for i, size in enumerate(schedule)}
        shares, sizes = list(schedule), list(schedule.values())
        if any(type(size) is not int or size < 1 for size in sizes) or not sizes:
            raise ValueError(f"`schedule` must name block lengths of 1 or more, such as [4, 8, 16], but has {sizes}.")
        if sizes != sorted(set(sizes)):
            raise ValueError(f"Block lengths in `schedule` must grow, but are {sizes}.")
        if shares[0] != 0 or shares != sorted(set(shares)) or shares[-1] >= 1:
            raise ValueError(
                "Shares of the run in `schedule` must start with 0 and grow, all below 1, such as in "
                f"{{0: 4, 0.5: 8}}, but are {shares}."
            )
        self.schedule = dict(schedule)

    def block_length(self, step: int, max_steps: int) -> int:
        """Tokens of a block in the update that follows `step` others."""
        share = step / max(max_steps, 1)
        return next(size for start, size in reversed(self.schedule.items()) if start <= share)


def follow_curriculum(trainer) -> BlockSizeCurriculum | None:
    """Sets the blocks that the next update trains, if a callback says which."""
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, BlockSizeCurriculum)]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"`callbacks` has {len(found)} curricula of blocks. Leave all but one out.")
    if trainer.grid.attention != "block" or trainer.objective.causal:
        raise ValueError(
            "`BlockSizeCurriculum` is for models with block attention, trained by blocks, but "
            f"`model` has {trainer.grid.attention} attention and the objective is a "
            f"`{type(trainer.objective).__name__}`. Leave it out of `callbacks`."
        )
    if trainer.args.block_length is not None:
        raise ValueError(
            f"`block_length={trainer.args.block_length}` and a `BlockSizeCurriculum` in `callbacks` both say how long "
            "blocks are. Leave one of them out."
        )
    size = found[0].block_length(trainer.state.global_step, trainer.state.max_steps)
    trainer.block_length = trainer.model.config.block_size = size
    trainer.grid = Grid(size)
    return found[0]
