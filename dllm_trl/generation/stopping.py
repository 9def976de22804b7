"""When a row ends before its limit and without EOS: stopping criteria, stop strings and the clock."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxTimeCriteria, StopStringCriteria


# What a criterion keeps per row. Other objects (a tokenizer, a `threading.Event`) are shared by its copies
_STATE = (list, dict, set, torch.Tensor, np.ndarray)


def deadline(criteria: StoppingCriteriaList) -> float | None:
    """When the first time limit is over, in seconds since the epoch."""
    return min(
        (c.initial_timestamp + c.max_time for c in criteria if isinstance(c, MaxTimeCriteria)),
        default=None,
    )


def _own(criterion: Callable) -> Callable:
    """A copy of a criterion with a state of its own."""
    own = copy.copy(criterion)
    for name, value in getattr(criterion, "__dict__", {}).items():
        if isinstance(value, _STATE):
            setattr(own, name, copy.deepcopy(value))
    return own


class Stopping:
    r"""
    Says how many of a row's tokens are kept once one of its blocks is full. Criteria see one row at a time, without
    padding. Of several rows each has its own copy of a criterion's state; a criterion that keeps a list or tensor with
    an entry per row of the batch sees its row in all of them, left-padded to the width of the batch.

    Args:
        criteria (`StoppingCriteriaList`): Criteria.
        rows (`int`): Rows of the batch.
        width (`int`): Width of the prompts.
        pad_token_id (`int`): What prompts are padded with.
    """

    def __init__(self, criteria: StoppingCriteriaList, rows: int, width: int, pad_token_id: int):
        self.strings = [c for c in criteria if isinstance(c, StopStringCriteria)]
        self.others = [c for c in criteria if not isinstance(c, (StopStringCriteria, MaxTimeCriteria))]
        self.rows, self.width, self.pad_token_id = rows, width, pad_token_id
        self.copies: dict[int, list[Callable]] = {}

    def __bool__(self) -> bool:
        return bool(self.strings or self.others)

    def __call__(self, row: int, prompt: torch.Tensor, response: torch.Tensor, first: int) -> int | None:
        """Tokens of `response` `(R,)` that stay if row number `row` ends, of which those from `first` on are new."""
        ids = torch.cat([prompt, response])[None]
        for end in range(first, len(response)):
            if any(c(ids[:, : len(prompt) + end + 1], None).all() for c in self.strings):
                return end + 1
        if self.rows > 1 and row not in self.copies:
            self.copies[row] = [_own(criterion) for criterion in self.others]
        for criterion in self.copies.get(row, self.others):
            batch = ids
            if self.rows > 1 and self._per_row(criterion):
                padding = ids.new_full((1, max(self.width - len(prompt), 0)), self.pad_token_id)
                batch = torch.cat([padding, ids], dim=1).expand(self.rows, -1)
            if torch.as_tensor(criterion(batch, None)).all():
                return len(response)
        return None

    def _per_row(self, criterion: Callable) -> bool:
        values = getattr(criterion, "__dict__", {}).values()
        sized = [value for value in values if isinstance(value, (list, torch.Tensor, np.ndarray))]
        return any(getattr(value, "ndim", 1) and len(value) == self.rows for value in sized)
