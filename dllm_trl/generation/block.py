"""Block attention: earlier blocks are final, so their keys and values are computed once and cached exactly."""

from collections import Counter

import numpy as np
import torch

from ..types import Grid
from .cache import Prefix, SlotCache
from .decoder import Decoder, Row
from .forward import Units


class BlockDecoder(Decoder):
    r"""
    The decoding loop of block diffusion. The whole blocks of a prompt are computed once (`prefill`) and copied into
    the slot of each sibling; what is left of the prompt is the revealed head of the first block. All rows share one
    forward per step: `[finished block b | masks of block b+1]` for a row whose block was just finished, `[block]` for
    the others. So committing a block to the cache costs no forward of its own, and a row's last block is never
    committed.

    ```
    forward     1     2     3     4     5     6          row 0: 2 + 3 denoising steps, 5 forwards
    row 0     [b1]  [b1]  [b1|b2] [b2] [b2]  (end)       the commit of b1 rides on the first step of b2
    ```

    With `logit_shift` 1 the token before predicts each one. A block's first token is predicted by the last committed
    token before it, whose logits stay the same while the block is denoised: they come out of the prefill or of the
    forward that commits that token, and are kept.
    """

    def _reserve(self, rows: list[Row], count: int) -> None:
        width, self.grid = self.width, Grid(self.width)
        # One block beyond the longest row: the last block may be wider than what the row may still generate
        length = self.grid.floor(max(len(row.prompt) + row.limit for row in rows)) + width
        self.cache = SlotCache(self.model.config, count, length, self._dtype(), self.device)
        self.forward.reserve(length)
        self.shift = self.model.config.logit_shift
        if self.shift:  # logits of the last committed token
            self.last = torch.zeros(count, self.model.config.vocab_size, device=self.device)
        self.prefixes: dict[bytes, Prefix] = {}
        for row in rows:
            row.prefix = row.prompt[: self.grid.floor(len(row.prompt))].tobytes()
        self.users = Counter(row.prefix for row in rows)  # rows that still have to load each prefix

    def _fill(self, taken: list[Row]) -> None:
        width = self.width
        new = list(dict.fromkeys(row.prefix for row in taken if row.prefix not in self.prefixes))
        heads = [torch.from_numpy(np.frombuffer(prefix, dtype=np.int64).copy()).to(self.device) for prefix in new]
        self.prefixes.update(zip(new, self.forward.prefill(heads, width), strict=True))
        for row in taken:
            slot = self._begin(row)
            prefix = self.prefixes[row.prefix]
            self.cache.load(slot, prefix)
            if prefix.logits is not None:
                self.last[slot] = prefix.logits
            self.users[row.prefix] -= 1
            if not self.users[row.prefix]:
                del self.prefixes[row.prefix]
            known = self.grid.offset(len(row.prompt))
            start = len(row.prompt) - known
            self._open(slot, start, start + width, row.prompt[start:])

    def _logits(self, slots: np.ndarray, read: np.ndarray) -> tuple[torch.Tensor, None]:
        forward = self._shifted if self.shift else self._forward
        logits = forward(slots, read)
        slots["pending"] = False
        return logits, None

    def _forward(self, slots: np.ndarray, read: np.ndarray) -> torch.Tensor:
        return self.forward.step(self._units(slots, read), self.cache).float()

    def _shifted(self, slots: np.ndarray, read: np.ndarray) -> torch.Tensor:
        """Logits for the tokens at `read`, each of them read one token earlier."""
        width, row_of, before = self.width, read // self.width, read - 1
        first, pending = read % width == 0, slots["pending"]
        committing = pending.nonzero()[0]
        # The first masks of rows that commit, in the order of the rows: at the end of the block being committed
        now = first & pending[row_of]
        before[now] = (len(slots) + np.arange(len(committing))) * width + width - 1
        kept = first & ~now
        if kept.all():
            return self.last[self._tensor(row_of)]
        logits = self._forward(slots, before[~kept])
        if len(committing):
            self.last[self._tensor(committing)] = logits[self._tensor(now[~kept])]
        if not kept.any():
            return logits
        every = logits.new_empty(len(read), logits.size(1))
        every[self._tensor(~kept)] = logits
        every[self._tensor(kept)] = self.last[self._tensor(row_of[kept])]
        return every

    def _units(self, slots: np.ndarray, read: np.ndarray) -> Units:
        """What the next forward computes."""
        start, width, count = slots["start"], self.width, len(slots)
        ids, rows, starts = slots["canvas"], np.arange(count), start
        visible = np.minimum(start + width, slots["end"])
        spans = self._spans(visible, rows)
        committing = slots["pending"].nonzero()[0]
        if len(committing):
            ids = np.concatenate([ids, slots["previous"][committing]])
            rows = np.concatenate([rows, committing])
            starts = np.concatenate([start, start[committing] - width])
            spans += self._spans(start[committing], committing, count)
            visible = np.concatenate([visible, start[committing]])
        return Units(
            ids=self._tensor(ids),
            positions=self._tensor(starts[:, None] + np.arange(width)),
            slots=self._tensor(rows),
            visible=self._tensor(visible),
            rows=len(ids) if self.shift else count,  # the logits of committed tokens, too
            length=int(visible.max()),
            read=self._tensor(read),
            spans=spans,
        )

    def _next(self, slot: int) -> None:
        block = self.slots[slot]
        block["previous"], block["pending"] = block["canvas"], True
        super()._next(slot)

    def _move(self, source: int, target: int) -> None:
        self.cache.move(source, target, int(self.slots["start"][source]))
        if self.shift:
            self.last[target] = self.last[source]
