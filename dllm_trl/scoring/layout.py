"""Packs all rounds of a micro-batch into one flat sequence: clean tokens once, a noisy copy per scored block."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..modeling.plans import AttentionPlan, ChunkedPlan, WholeSequences
from ..types import Grid, Round, Rows


# Tokens per query segment. Short segments compute fewer scores that the mask throws away, long ones need fewer calls.
CLEAN_SEGMENT = 64
NOISY_SEGMENT = 128


@dataclass
class PackedRounds:
    r"""
    One forward pass that scores every round of a micro-batch.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, N)`):
            Block attention: per group of rows the full blocks of their prompt, then per row the clean rest and its
            noisy copies. Full attention: a whole sequence for each round of each row.
        position_ids (`torch.LongTensor` of shape `(1, N)`):
            Positions in the row's sequence without its padding; a noisy copy has those of its clean block.
        plan ([`AttentionPlan`] or [`ChunkedPlan`]):
            Who attends to whom.
        score_index (`torch.LongTensor` of shape `(n,)`):
            Where in the `N` tokens the logits of each scored token are read.
        labels (`torch.LongTensor` of shape `(n,)`):
            The scored tokens.
        index (`tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]`, each of shape `(n,)`):
            Round, row and response column of each scored token.
        shape (`tuple[int, int, int]`):
            Number of rounds, rows and response columns.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    plan: AttentionPlan | ChunkedPlan
    score_index: torch.Tensor
    labels: torch.Tensor
    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    shape: tuple[int, int, int]

    def model_inputs(self) -> dict[str, Any]:
        """What the model's forward takes."""
        names = ("input_ids", "position_ids", "plan", "score_index")
        return {name: getattr(self, name) for name in names} | {"use_cache": False}

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """Values `(n,)` of the scored tokens as `(num_rounds, B, R)`, 0 elsewhere. Differentiable."""
        return values.new_zeros(self.shape).index_put(self.index, values)

    def pad_chunks(self, count: int) -> "PackedRounds":
        """With chunks of one token that nobody reads, up to `count` of them: sharded processes run in step."""
        missing = count - len(self.plan.plans)
        if missing <= 0:
            return self
        plan = _whole_sequences([1], self.input_ids.device)
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, self.input_ids[:, :1].expand(-1, missing)], dim=1),
            position_ids=F.pad(self.position_ids, (0, missing)),
            plan=ChunkedPlan(
                self.plan.plans + [plan] * missing, self.plan.tokens + [1] * missing, self.plan.reads + [0] * missing
            ),
        )


class _Sequence:
    """The flat sequence under construction: token columns and segments."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.columns: list[np.ndarray] = []  # each (7, m): id, position, group, row, clean, block, copy
        self.sizes: list[int] = []
        self.keys: list[list[int]] = []
        self.blocks: list[tuple[int, int]] = []  # first and last block of each segment
        self.length = 0
        self.num_copies = 0

    def add_clean(self, ids: np.ndarray, start: int, group: int, row: int, context: list[int]) -> list[int]:
        """
        Appends clean tokens from position `start` on, which begins a block, and returns their segments. Each sees the
        segments of `context`, those before it and itself.
        """
        positions = start + np.arange(len(ids))
        units = np.diff(np.append(np.arange(0, len(ids), self.grid.block_length), len(ids)))
        copies = np.full(len(ids), -1)
        added = []
        for me, _ in self._append(ids, positions, group, row, copies, units, CLEAN_SEGMENT):
            added.append(me)
            self.keys.append(context + added)
        return added

    def add_copies(
        self, ids: np.ndarray, positions: np.ndarray, group: int, row: int, units: np.ndarray, context: list[int]
    ) -> None:
        """
        Appends noisy copies of blocks, `units` are their lengths. A segment sees those segments of `context` that
        begin before its last block, and itself.
        """
        copies = np.repeat(np.arange(len(units)), units) + self.num_copies
        self.num_copies += len(units)
        for me, last in self._append(ids, positions, group, row, copies, units, NOISY_SEGMENT):
            self.keys.append([*(i for i in context if self.blocks[i][0] < last), me])

    def _append(self, ids, positions, group, row, copies, units, target) -> Iterator[tuple[int, int]]:
        """Appends tokens in segments of whole `units` and yields each segment's index and last block."""
        if not len(ids):
            return
        blocks = self.grid.block(positions)
        whole = np.full((2, len(ids)), [[group], [row]])
        self.columns.append(np.stack([ids, positions, *whole, copies == -1, blocks, copies]))
        self.length += len(ids)
        # Balanced: every segment takes the units that begin in its share of the tokens.
        count = max(1, round(len(ids) / target))
        share = (np.cumsum(units) - units) * count // len(ids)
        sizes = np.bincount(share, weights=units, minlength=count).astype(int)
        for size, end in zip(sizes.tolist(), np.cumsum(sizes).tolist(), strict=True):
            if size:
                self.sizes.append(size)
                self.blocks.append((int(blocks[end - size]), int(blocks[end - 1])))
                yield len(self.sizes) - 1, self.blocks[-1][1]


def _check_predictable(before: np.ndarray, row: int) -> None:
    if (before < 0).any():
        raise ValueError(
            f"Row {row} scores its very first token, which nothing before it can predict: give the row a prompt."
        )


class _Arrays(NamedTuple):
    """Rows and their `K` rounds on the CPU."""

    prompts: np.ndarray  # (B, P)
    real: np.ndarray  # (B, P), True for prompt tokens
    canvases: np.ndarray  # (B, R)
    exists: np.ndarray  # (B, R), True where the position exists for the row
    masked: np.ndarray  # (K, B, R)
    scored: np.ndarray  # (K, B, R)

    @classmethod
    def of(cls, rows: Rows, rounds: list[Round]) -> "_Arrays":
        empty = np.zeros((0, *rows.canvas_ids.shape), bool)
        masked = torch.stack([r.masked for r in rounds]).cpu().numpy() if rounds else empty
        scored = torch.stack([r.scored for r in rounds]).cpu().numpy() if rounds else empty
        exists = rows.canvas_mask.bool().cpu().numpy()
        if scored.shape[1:] != exists.shape:
            raise ValueError(f"`rounds` are of shape {scored.shape[1:]}, but `rows` have {exists.shape}.")
        if (scored & ~exists).any():
            raise ValueError("`rounds` score positions that do not exist in `canvas_mask`.")
        real = rows.prompt_mask.bool().cpu().numpy()
        return cls(rows.prompt_ids.cpu().numpy(), real, rows.canvas_ids.cpu().numpy(), exists, masked, scored)

    def some_token(self) -> np.ndarray:
        """A token to run the model on where nothing is scored, so that every process runs as many forwards."""
        token = np.concatenate([self.prompts[self.real], self.canvases[self.exists]])[:1]
        if not len(token):
            raise ValueError("The batch has no tokens: there is nothing to run the model on.")
        return token


def pack_rounds(
    rows: Rows,
    rounds: list[Round],
    *,
    mask_token_id: int,
    logit_shift: int = 0,
    share_prompts: bool = True,
    rounds_per_forward: int | None = None,
) -> PackedRounds:
    r"""
    Lays the rounds of a micro-batch out in one flat sequence without padding: [`pack_blocks`] for block attention,
    [`pack_whole`] for full attention.

    Args:
        rows ([`Rows`]):
            Prompts and canvases; their grid says which attention it is.
        rounds (`list[Round]`):
            Which positions are masked and which of them are scored.
        mask_token_id (`int`):
            Token that stands for a masked position.
        logit_shift (`int`, *optional*, defaults to `0`):
            1 where the model predicts a token at the position before it.
        share_prompts (`bool`, *optional*, defaults to `True`):
            Block attention: whether rows with the same prompt share its full blocks.
        rounds_per_forward (`int`, *optional*):
            Full attention: the sequences are cut into chunks of `B * rounds_per_forward`. `None`: one chunk.

    Returns:
        [`PackedRounds`]: The packed forward pass.
    """
    if rows.grid.attention == "block":
        return pack_blocks(rows, rounds, mask_token_id, logit_shift, share_prompts)
    return pack_whole(rows, rounds, mask_token_id, logit_shift, rounds_per_forward)


def pack_blocks(
    rows: Rows, rounds: list[Round], mask_token_id: int, logit_shift: int = 0, share_prompts: bool = True
) -> PackedRounds:
    """
    [`pack_rounds`] of block attention: a group of rows with the same prompt holds its full blocks once. Each of its
    rows then holds its clean rest (the prompt's remainder and the canvas) up to the block before its last scored one,
    which no token reads, and one noisy copy of a block for each round that scores a token there. Rows without a scored
    token are left out.
    """
    batch, grid = _Arrays.of(rows, rounds), rows.grid
    kept = batch.scored.any(axis=(0, 2))
    groups: dict[bytes | int, list[int]] = {}
    for row in np.flatnonzero(kept).tolist():
        key = batch.prompts[row][batch.real[row]].tobytes() if share_prompts else row
        groups.setdefault(key, []).append(row)

    sequence = _Sequence(grid)
    score_index, found = [np.zeros(0, int)], [np.zeros((3, 0), int)]
    if not groups:
        sequence.add_clean(batch.some_token(), 0, 0, 0, [])
    for group, members in enumerate(groups.values()):
        prompt = batch.prompts[members[0]][batch.real[members[0]]]
        shared = grid.floor(len(prompt))
        prompt_start = sequence.length
        head = sequence.add_clean(prompt[:shared], 0, group, -1, [])
        for row in members:
            columns = np.flatnonzero(batch.exists[row])
            tokens = np.concatenate([prompt, batch.canvases[row, columns]])

            # The copies, sorted by block: those (block, round) that score something.
            block_of = grid.block(len(prompt) + np.arange(len(columns)))
            first = np.flatnonzero(np.diff(block_of, prepend=-1))
            scores = np.logical_or.reduceat(batch.scored[:, row, columns], first, axis=1)
            which, copy_round = np.nonzero(scores.T)
            start = block_of[first][which] * grid.block_length
            units = np.minimum(start + grid.block_length, len(tokens)) - start
            token_round = np.repeat(copy_round, units)
            positions = np.arange(units.sum()) + np.repeat(start - (np.cumsum(units) - units), units)

            # The clean tokens they see.
            clean_start = sequence.length
            clean = sequence.add_clean(tokens[shared : start[-1]], shared, group, row, head)

            noisy = tokens[positions]
            answer = positions >= len(prompt)
            column = columns[np.where(answer, positions - len(prompt), 0)]
            noisy[answer & batch.masked[token_round, row, column]] = mask_token_id
            noisy_start = sequence.length
            sequence.add_copies(noisy, positions, group, row, units, head + clean)

            hits = np.flatnonzero(answer & batch.scored[token_round, row, column])
            read = hits + noisy_start
            if logit_shift:
                before = positions[hits] - 1
                _check_predictable(before, row)
                clean_read = np.where(before < shared, prompt_start + before, clean_start + before - shared)
                read = np.where(grid.offset(positions[hits]), read - 1, clean_read)
            score_index.append(read)
            found.append(np.stack([token_round[hits], np.full(len(hits), row), column[hits]]))

    return _finish(sequence, score_index, found, rows.canvas_ids, batch.scored.shape)


def _finish(
    sequence: _Sequence,
    score_index: list[np.ndarray],
    found: list[np.ndarray],
    canvas_ids: torch.Tensor,
    shape: tuple[int, int, int],
) -> PackedRounds:
    device = canvas_ids.device
    table = torch.from_numpy(np.concatenate(sequence.columns, axis=1))
    ids, positions, group, row, clean, block, copy = table
    index = tuple(torch.from_numpy(np.concatenate(found, axis=1)).to(device))
    return PackedRounds(
        input_ids=ids[None].to(device),
        position_ids=positions[None].to(device),
        plan=AttentionPlan(sequence.sizes, sequence.keys, group, row, clean.bool(), block, copy, device),
        score_index=torch.from_numpy(np.concatenate(score_index)).to(device),
        labels=canvas_ids[index[1], index[2]],
        index=index,
        shape=shape,
    )


def _whole_sequences(sizes: list[int], device: torch.device) -> WholeSequences:
    copy = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    same = torch.zeros_like(copy)
    keys = [[i] for i in range(len(sizes))]
    return WholeSequences(sizes, keys, same, same, same.bool(), same, copy, device)


def pack_whole(
    rows: Rows,
    rounds: list[Round],
    mask_token_id: int,
    logit_shift: int = 0,
    rounds_per_forward: int | None = None,
) -> PackedRounds:
    """
    [`pack_rounds`] of full attention: a whole sequence for each round that scores a token of the row, since what one
    token becomes is seen by all others; in the order of the rounds, `B * rounds_per_forward` of them at a time.
    """
    if rounds_per_forward is not None and rounds_per_forward < 1:
        raise ValueError(f"`rounds_per_forward` must be at least 1, but is {rounds_per_forward}.")
    batch = _Arrays.of(rows, rounds)
    ids, positions, reads, found = [], [], [], []
    for which, row in zip(*(x.tolist() for x in batch.scored.any(-1).nonzero()), strict=True):
        prompt, columns = batch.prompts[row][batch.real[row]], np.flatnonzero(batch.exists[row])
        noisy = np.where(batch.masked[which, row, columns], mask_token_id, batch.canvases[row, columns])
        hits = np.flatnonzero(batch.scored[which, row, columns])
        read = len(prompt) + hits - logit_shift
        _check_predictable(read, row)
        ids.append(np.concatenate([prompt, noisy]))
        positions.append(np.arange(len(ids[-1])))
        reads.append(read)
        found.append(np.stack([np.full(len(hits), which), np.full(len(hits), row), columns[hits]]))
    if not ids:
        ids, positions = [batch.some_token()], [np.zeros(1, int)]
        reads, found = [np.zeros(0, int)], [np.zeros((3, 0), int)]

    device = rows.canvas_ids.device
    sizes = [len(x) for x in ids]
    starts = np.cumsum(sizes) - sizes
    index = tuple(torch.from_numpy(np.concatenate(found, axis=1)).to(device))
    step = len(sizes) if rounds_per_forward is None else len(rows) * rounds_per_forward
    chunks = [slice(i, i + step) for i in range(0, len(sizes), step)]
    return PackedRounds(
        input_ids=torch.from_numpy(np.concatenate(ids))[None].to(device),
        position_ids=torch.from_numpy(np.concatenate(positions))[None].to(device),
        plan=ChunkedPlan(
            plans=[_whole_sequences(sizes[chunk], device) for chunk in chunks],
            tokens=[sum(sizes[chunk]) for chunk in chunks],
            reads=[sum(map(len, reads[chunk])) for chunk in chunks],
        ),
        score_index=torch.from_numpy(np.concatenate([r + s for r, s in zip(reads, starts, strict=True)])).to(device),
        labels=rows.canvas_ids[index[1], index[2]],
        index=index,
        shape=batch.scored.shape,
    )


def pack_causal(rows: Rows, round_: Round) -> PackedRounds:
    r"""
    Lays a micro-batch out for training from left to right: clean tokens, causal attention, each scored token read at
    the position before it, whatever the family's own attention and shift are.

    Args:
        rows ([`Rows`]):
            Prompts and canvases.
        round_ ([`Round`]):
            Which tokens are scored.

    Returns:
        [`PackedRounds`]: The packed forward pass, of one round.
    """
    batch = _Arrays.of(rows, [round_])
    sequence = _Sequence(Grid(1))  # causal is block-causal in blocks of one token
    score_index, found = [np.zeros(0, int)], [np.zeros((3, 0), int)]
    for row in np.flatnonzero(batch.scored[0].any(1)).tolist():
        prompt, columns = batch.prompts[row][batch.real[row]], np.flatnonzero(batch.exists[row])
        hits = np.flatnonzero(batch.scored[0, row, columns])
        before = len(prompt) + hits - 1
        _check_predictable(before, row)
        score_index.append(before + sequence.length)
        found.append(np.stack([np.zeros(len(hits), int), np.full(len(hits), row), columns[hits]]))
        # Nobody reads what comes after the last scored token
        tokens = np.concatenate([prompt, batch.canvases[row, columns]])[: before[-1] + 1]
        sequence.add_clean(tokens, 0, row, row, [])
    if not sequence.length:
        sequence.add_clean(batch.some_token(), 0, 0, 0, [])
    return _finish(sequence, score_index, found, rows.canvas_ids, batch.scored.shape)
