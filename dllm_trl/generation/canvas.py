"""Full attention: every token of a row sees every other, so a row is computed anew, or partly with old keys."""

import numpy as np
import torch

from .cache import SlotCache
from .decoder import Decoder, Row
from .forward import Units


class CanvasDecoder(Decoder):
    r"""
    The decoding loop over a canvas: `[prompt | max_new_tokens masks]`, denoised block by block. What a step computes:

    ```
                          prompt      blocks done   block         later masks     logits
    cache="none"          computed    computed      computed      computed        of the block's masks
    "prefix", "dual"      computed    computed      computed      computed        first step of a block: the same
    "prefix"              old keys    old keys      computed      computed        the steps after it
      refresh_interval=k  old keys    old keys      computed      k computed, no more seen
    "dual"                old keys    old keys      computed      old keys
    ```

    With `logit_shift` 1 the token before the block predicts its first one and is computed in the first step only: with
    a cache that step commits the first token and nothing else. Guidance takes a second row of the same forward, whose
    prompt is masked, at slot `count + s` for slot `s`.

    Masks inside the prompt (`cache="none"` only) belong to the first block, which then begins at the first of them and
    holds the prompt's other tokens as they are. What is filled in there is as visible as the response: to guidance's
    second row, too.
    """

    def _first_block(self, row: Row) -> tuple[int, int]:
        masks = (row.prompt == self.settings.mask_token_id).nonzero()[0]
        start = int(masks[0]) if len(masks) else len(row.prompt)
        return start, len(row.prompt) + min(self.settings.block_length or row.limit, row.limit)

    def _width(self, rows: list[Row]) -> int:
        return max(stop - start for start, stop in map(self._first_block, rows))

    def _reserve(self, rows: list[Row], count: int) -> None:
        for row in rows:
            row.ids[:], row.canvas_length = (
                self.settings.mask_token_id,
                row.limit,
            )  # of rows without a slot too
        self.guided, self.shift = self.settings.cfg_scale > 0, self.model.config.logit_shift
        self.length = max(len(row.prompt) + row.limit for row in rows)
        lines = count * (2 if self.guided else 1)
        # One position beyond the longest row takes what a narrower row of a forward is padded with
        self.ids = np.full((lines, self.length + 1), self.settings.mask_token_id)
        self.cache = None
        if self.settings.cache != "none":
            self.cache = SlotCache(self.model.config, lines, self.length + 1, self._dtype(), self.device)
        self.forward.reserve(self.length + 1)

    def _fill(self, taken: list[Row]) -> None:
        for row in taken:
            slot = self._begin(row)
            self.ids[self._lines(slot)] = self.settings.mask_token_id
            self.ids[slot, : len(row.prompt)] = row.prompt
            start, stop = self._first_block(row)
            self._open(slot, start, stop, row.prompt[start:])

    def _lines(self, slots):
        """Where `slots` and their unguided twins are."""
        return np.append(slots, slots + len(self.slots)) if self.guided else np.atleast_1d(slots)

    def _block_widths(self, slots: np.ndarray) -> np.ndarray:
        return slots["stop"] - slots["start"] - slots["given"].sum(-1)

    def _candidates(self, slots: np.ndarray) -> np.ndarray:
        if self.cache is None or not self.shift:
            return slots["masked"]
        return slots["masked"] & ((slots["step"] > 0)[:, None] | (np.arange(self.width) == 0))

    def _quotas(self, slots: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        quotas = super()._quotas(slots, candidates)
        if self.cache is None or not self.shift:
            return quotas
        return np.where(slots["step"] == 0, np.maximum(quotas, 1), quotas)

    def _logits(self, slots: np.ndarray, read: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        whole = slots["step"] == 0 if self.cache is not None else np.ones(len(slots), dtype=np.bool_)
        row_of, pieces, order = read // self.width, [], []
        for rows in (whole, ~whole):  # of different widths: one forward each
            if rows.any():
                own = rows[row_of]
                units = self._units(slots, rows.nonzero()[0], read[own], rows is whole)
                pieces.append(self.forward.step(units, self.cache).float())
                order.append(own.nonzero()[0])
        if self.guided:
            pieces, twins = zip(*(piece.chunk(2) for piece in pieces), strict=True)
            twin = self._merge(twins, order)
        logits = self._merge(pieces, order)
        return (twin + (self.settings.cfg_scale + 1) * (logits - twin), logits) if self.guided else (logits, None)

    def _merge(self, pieces: list[torch.Tensor], order: list[np.ndarray]) -> torch.Tensor:
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)[self._tensor(np.concatenate(order).argsort())]

    def _units(self, slots: np.ndarray, rows: np.ndarray, read: np.ndarray, whole: bool) -> Units:
        """The forward of `rows`: whole ones, or what the cache wants to be computed in each step."""
        start, stop, end = slots["start"][rows], slots["stop"][rows], slots["end"][rows]
        lines = self._lines(rows)
        first, last, visible = start, stop, end
        if whole:
            first, last = np.zeros_like(start), end
        elif self.settings.cache == "prefix":
            horizon = self.settings.refresh_interval
            last = visible = end if horizon is None else np.minimum(stop + horizon, end)
        copies = (len(lines) // len(rows), 1)
        self._write(rows)
        width = int((last - first).max())
        positions = np.minimum(first[:, None] + np.arange(width), self.length)
        # After the last layer's keys and values, only tokens of the block are carried on
        head = np.maximum(start - self.shift - first, 0)
        unit = np.searchsorted(rows, read // self.width)
        column = (start - self.shift - first - head)[unit] + read % self.width
        kept = int(column.max()) + 1
        positions, visible, head = np.tile(positions, copies), np.tile(visible, copies[0]), np.tile(head, copies[0])
        carried = None
        if kept < width or head.any():
            carried = np.arange(len(lines))[:, None] * width + np.minimum(head[:, None] + np.arange(kept), width - 1)
        read = unit * min(kept, width) + column
        if self.guided:
            read = np.append(read, read + len(rows) * min(kept, width))
        return Units(
            ids=self._tensor(self.ids[lines[:, None], positions]),
            positions=self._tensor(positions),
            slots=self._tensor(lines),
            visible=self._tensor(visible),
            rows=len(lines),
            length=int(visible.max()),
            read=self._tensor(read),
            spans=self._spans(visible, lines),
            carried=None if carried is None else self._tensor(carried),
        )

    def _write(self, rows: np.ndarray) -> None:
        """Puts the blocks of `rows` where the forwards read them; an unguided twin sees nothing of its prompt."""
        where = np.minimum(self.slots["start"][rows, None] + np.arange(self.width), self.length)
        canvas = self.slots["canvas"][rows]
        self.ids[rows[:, None], where] = canvas
        if self.guided:
            unguided = np.where(self.slots["given"][rows], self.settings.mask_token_id, canvas)
            self.ids[rows[:, None] + len(self.slots), where] = unguided

    def _store(self, slot: int) -> tuple[int, int]:
        row, block = self.rows[slot], self.slots[slot]
        row.prompt[block["start"] :] = block["canvas"][: max(len(row.prompt) - block["start"], 0)]
        return super()._store(slot)

    def _next(self, slot: int) -> None:
        self._write(np.array([slot]))
        super()._next(slot)

    def _close(self, slot: int) -> None:
        self.rows[slot].canvas_length = self.rows[slot].limit  # never decoded masks are part of what the row saw
        super()._close(slot)

    def _move(self, source: int, target: int) -> None:
        for a, b in zip(self._lines(source), self._lines(target), strict=True):
            self.ids[b] = self.ids[a]
            if self.cache is not None:
                self.cache.move(int(a), int(b), int(self.slots["end"][source]))
