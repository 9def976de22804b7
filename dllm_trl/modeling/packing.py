"""Packs all rounds of a micro-batch into one flat sequence: clean tokens once, a noisy copy per scored block."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from dllm_trl.types import Round


# Tokens per query segment. Short segments compute fewer scores that the mask throws away, long ones need fewer calls.
CLEAN_SEGMENT = 64
NOISY_SEGMENT = 128


def _visible(q: tuple, k: tuple):
    """Who sees whom. `q` and `k` are `(group, row, clean, block, copy)` of tokens, broadcast against each other."""
    q_group, q_row, q_clean, q_block, q_copy = q
    k_group, k_row, k_clean, k_block, k_copy = k
    context = (q_group == k_group) & ((k_row == -1) | (k_row == q_row))
    earlier = k_clean & ((k_block < q_block) | (q_clean & (k_block == q_block)))
    return context & (earlier | (~k_clean & (k_copy == q_copy)))


@dataclass
class AttentionPlan:
    r"""
    Who attends to whom in a packed sequence of `N` tokens, as segments of queries that share a list of keys.

    Args:
        sizes (`list[int]`):
            Lengths of the consecutive segments, sum `N`.
        keys (`list[list[int]]`):
            For each segment, the segments (whole, in this order) that are its keys.
        group (`torch.LongTensor` of shape `(N,)`):
            Rows of one group share the full blocks of their prompt.
        row (`torch.LongTensor` of shape `(N,)`):
            Row of the micro-batch, -1 for the shared part of a prompt.
        clean (`torch.BoolTensor` of shape `(N,)`):
            `True` for the clean sequence, `False` for a noisy copy of one of its blocks.
        block (`torch.LongTensor` of shape `(N,)`):
            Block of the token on the grid anchored at token 0 of its sequence.
        copy (`torch.LongTensor` of shape `(N,)`):
            Noisy copy the token belongs to, -1 for clean tokens.
        device (`torch.device`):
            Where the masks are put. The metadata above stays on the CPU.
    """

    sizes: list[int]
    keys: list[list[int]]
    group: torch.Tensor
    row: torch.Tensor
    clean: torch.Tensor
    block: torch.Tensor
    copy: torch.Tensor
    device: torch.device

    @property
    def _tokens(self) -> tuple[torch.Tensor, ...]:
        return self.group, self.row, self.clean, self.block, self.copy

    @cached_property
    def masks(self) -> list[torch.Tensor | None]:
        """Per segment its boolean mask `(1, 1, q, k)`, `True` = may attend, or `None` where every key is visible."""
        tokens = [x.numpy() for x in self._tokens]
        segments = np.split(np.arange(len(self.group)), np.cumsum(self.sizes)[:-1])
        masks = []
        for queries, keys in zip(segments, self.keys, strict=True):
            keys = np.concatenate([segments[i] for i in keys])
            masks.append(_visible(tuple(x[queries, None] for x in tokens), tuple(x[None, keys] for x in tokens)))
        needed = [mask for mask in masks if not mask.all()]
        # One transfer to the device for all of them.
        flat = torch.from_numpy(np.concatenate([mask.ravel() for mask in needed] or [np.zeros(0, bool)]))
        cut = iter(flat.to(self.device).split([mask.size for mask in needed]))
        return [None if mask.all() else next(cut).view(1, 1, *mask.shape) for mask in masks]

    def dense(self) -> torch.Tensor:
        """The same visibility as one boolean mask `(1, 1, N, N)`: the reference, and the mask of eager attention."""
        tokens = self._tokens
        mask = _visible(tuple(x[:, None] for x in tokens), tuple(x[None, :] for x in tokens))
        return mask[None, None].to(self.device)

    def block_mask(self, device: torch.device | str | None = None):
        """The same visibility as a `BlockMask` for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        device = self.device if device is None else device
        tokens = tuple(x.to(device) for x in self._tokens)

        def mask_mod(batch, head, q_index, k_index):
            return _visible(tuple(x[q_index] for x in tokens), tuple(x[k_index] for x in tokens))

        length = len(self.group)
        return create_block_mask(mask_mod, None, None, length, length, device=str(device))


class WholeSequences(AttentionPlan):
    """Full attention: every segment is a sequence of its own, whose tokens all see each other."""

    masks = property(lambda self: [None] * len(self.sizes))


@dataclass
class ChunkedPlan:
    r"""
    A flat sequence that the backbone computes in chunks, one after another. In training each chunk keeps its input
    only and is computed again in the backward pass, so memory is that of one chunk, however many there are.

    Args:
        plans (`list[AttentionPlan]`):
            Plan of each chunk.
        tokens (`list[int]`):
            Tokens of each chunk, sum `N`.
        reads (`list[int]`):
            How many of `score_index`, which is in ascending order of chunks, lie in each chunk.
    """

    plans: list[AttentionPlan]
    tokens: list[int]
    reads: list[int]


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

    def __init__(self, block_length: int):
        self.block_length = block_length
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
        units = np.diff(np.append(np.arange(0, len(ids), self.block_length), len(ids)))
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
        blocks = positions // self.block_length
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


def pack_rounds(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    canvas_ids: torch.Tensor,
    canvas_mask: torch.Tensor,
    rounds: list[Round],
    *,
    block_length: int | None,
    mask_token_id: int,
    logit_shift: int = 0,
    share_prompts: bool = True,
    rounds_per_forward: int | None = None,
) -> PackedRounds:
    r"""
    Lays the rounds of a micro-batch out in one flat sequence without padding.

    Block attention: a group of rows with the same prompt holds its full blocks once. Each of its rows then holds its
    clean rest (the prompt's remainder and the canvas) up to the block before its last scored one, which no token
    reads, and one noisy copy of a block for each round that scores a token there. Rows without a scored token are
    left out.

    Full attention: a whole sequence for each round that scores a token of the row, since what one token becomes is
    seen by all others.

    Args:
        prompt_ids (`torch.LongTensor` of shape `(B, P)`):
            Prompts, padded anywhere.
        prompt_mask (`torch.Tensor` of shape `(B, P)`):
            1 for prompt tokens.
        canvas_ids (`torch.LongTensor` of shape `(B, R)`):
            The clean response, with every token that was context of another.
        canvas_mask (`torch.Tensor` of shape `(B, R)`):
            1 where the position exists for the row.
        rounds (`list[Round]`):
            Which positions are masked and which of them are scored, `(B, R)` each.
        block_length (`int`):
            Tokens denoised together. The grid is anchored at token 0 of each row without its padding. `None`: full
            attention.
        mask_token_id (`int`):
            Token that stands for a masked position.
        logit_shift (`int`, *optional*, defaults to `0`):
            1 where the model predicts a token at the position before it.
        share_prompts (`bool`, *optional*, defaults to `True`):
            Whether rows with the same prompt share its full blocks. Block attention only.
        rounds_per_forward (`int`, *optional*):
            Full attention: the sequences are cut into chunks of `B * rounds_per_forward`. `None`: one chunk.

    Returns:
        [`PackedRounds`]: The packed forward pass.
    """
    for name, value in (("block_length", block_length), ("rounds_per_forward", rounds_per_forward)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value}.")
    num_rows, num_columns = canvas_ids.shape
    prompts, canvases = prompt_ids.cpu().numpy(), canvas_ids.cpu().numpy()
    real, exists = prompt_mask.bool().cpu().numpy(), canvas_mask.bool().cpu().numpy()
    empty = np.zeros((0, num_rows, num_columns), bool)
    masked = torch.stack([r.masked for r in rounds]).cpu().numpy() if rounds else empty
    scored = torch.stack([r.scored for r in rounds]).cpu().numpy() if rounds else empty
    if (scored & ~exists).any():
        raise ValueError("`rounds` score positions that do not exist in `canvas_mask`.")
    if block_length is None:
        per_chunk = None if rounds_per_forward is None else num_rows * rounds_per_forward
        batch = prompts, real, canvases, exists
        return _pack_whole(batch, masked, scored, mask_token_id, logit_shift, per_chunk, canvas_ids)

    kept = scored.any(axis=(0, 2))
    groups: dict[bytes | int, list[int]] = {}
    for row in np.flatnonzero(kept).tolist():
        groups.setdefault(prompts[row][real[row]].tobytes() if share_prompts else row, []).append(row)

    sequence = _Sequence(block_length)
    score_index, found = [np.zeros(0, int)], [np.zeros((3, 0), int)]
    if not groups:
        # Some token to run the model on, so that every process runs as many forwards.
        token = np.concatenate([prompts[real], canvases[exists]])[:1]
        if not len(token):
            raise ValueError("The batch has no tokens: there is nothing to run the model on.")
        sequence.add_clean(token, 0, 0, 0, [])
    for group, rows in enumerate(groups.values()):
        prompt = prompts[rows[0]][real[rows[0]]]
        shared = len(prompt) // block_length * block_length
        prompt_start = sequence.length
        head = sequence.add_clean(prompt[:shared], 0, group, -1, [])
        for row in rows:
            columns = np.flatnonzero(exists[row])
            tokens = np.concatenate([prompt, canvases[row, columns]])

            # The copies, sorted by block: those (block, round) that score something.
            block_of = (len(prompt) + np.arange(len(columns))) // block_length
            first = np.flatnonzero(np.diff(block_of, prepend=-1))
            scores = np.logical_or.reduceat(scored[:, row, columns], first, axis=1)
            which, copy_round = np.nonzero(scores.T)
            copy_block = block_of[first][which]
            start = copy_block * block_length
            units = np.minimum(start + block_length, len(tokens)) - start
            token_round = np.repeat(copy_round, units)
            positions = np.arange(units.sum()) + np.repeat(start - (np.cumsum(units) - units), units)

            # The clean tokens they see.
            clean_start = sequence.length
            clean = sequence.add_clean(tokens[shared : copy_block[-1] * block_length], shared, group, row, head)

            noisy = tokens[positions]
            answer = positions >= len(prompt)
            column = columns[np.where(answer, positions - len(prompt), 0)]
            noisy[answer & masked[token_round, row, column]] = mask_token_id
            noisy_start = sequence.length
            sequence.add_copies(noisy, positions, group, row, units, head + clean)

            hits = np.flatnonzero(answer & scored[token_round, row, column])
            read = hits + noisy_start
            if logit_shift:
                before = positions[hits] - 1
                _check_predictable(before, row)
                clean_read = np.where(before < shared, prompt_start + before, clean_start + before - shared)
                read = np.where(positions[hits] % block_length, read - 1, clean_read)
            score_index.append(read)
            found.append(np.stack([token_round[hits], np.full(len(hits), row), column[hits]]))

    return _finish(sequence, score_index, found, canvas_ids, (len(rounds), num_rows, num_columns))


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


def _pack_whole(
    batch: tuple[np.ndarray, ...],
    masked: np.ndarray,
    scored: np.ndarray,
    mask_token_id: int,
    logit_shift: int,
    per_chunk: int | None,
    canvas_ids: torch.Tensor,
) -> PackedRounds:
    """[`pack_rounds`] of full attention: sequences in the order of the rounds, `per_chunk` of them at a time."""
    prompts, real, canvases, exists = batch
    rounds, rows = scored.any(-1).nonzero()
    ids, positions, reads, found = [], [], [], []
    for which, row in zip(rounds.tolist(), rows.tolist(), strict=True):
        prompt, columns = prompts[row][real[row]], np.flatnonzero(exists[row])
        noisy = np.where(masked[which, row, columns], mask_token_id, canvases[row, columns])
        hits = np.flatnonzero(scored[which, row, columns])
        read = len(prompt) + hits - logit_shift
        _check_predictable(read, row)
        ids.append(np.concatenate([prompt, noisy]))
        positions.append(np.arange(len(ids[-1])))
        reads.append(read)
        found.append(np.stack([np.full(len(hits), which), np.full(len(hits), row), columns[hits]]))
    if not ids:  # some token to run the model on
        ids, positions = [np.concatenate([prompts[real], canvases[exists]])[:1]], [np.zeros(1, int)]
        if not len(ids[0]):
            raise ValueError("The batch has no tokens: there is nothing to run the model on.")
        reads, found = [np.zeros(0, int)], [np.zeros((3, 0), int)]

    device = canvas_ids.device
    sizes = [len(x) for x in ids]
    starts = np.cumsum(sizes) - sizes
    index = tuple(torch.from_numpy(np.concatenate(found, axis=1)).to(device))
    step = per_chunk or len(sizes)
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
        labels=canvas_ids[index[1], index[2]],
        index=index,
        shape=scored.shape,
    )


def pack_causal(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    canvas_ids: torch.Tensor,
    canvas_mask: torch.Tensor,
    scored: torch.Tensor,
) -> PackedRounds:
    r"""
    Lays a micro-batch out for training from left to right: clean tokens, causal attention, each scored token read at
    the position before it, whatever the family's own attention and shift are.

    Args:
        prompt_ids, prompt_mask, canvas_ids, canvas_mask:
            As in [`pack_rounds`].
        scored (`torch.BoolTensor` of shape `(B, R)`):
            Tokens to be scored.

    Returns:
        [`PackedRounds`]: The packed forward pass, of one round.
    """
    prompts, canvases = prompt_ids.cpu().numpy(), canvas_ids.cpu().numpy()
    real, exists, wanted = (x.bool().cpu().numpy() for x in (prompt_mask, canvas_mask, scored))
    if (wanted & ~exists).any():
        raise ValueError("`scored` has positions that do not exist in `canvas_mask`.")
    sequence = _Sequence(1)  # causal is block-causal in blocks of one token
    score_index, found = [np.zeros(0, int)], [np.zeros((3, 0), int)]
    for row in np.flatnonzero(wanted.any(1)).tolist() or [0]:
        prompt, columns = prompts[row][real[row]], np.flatnonzero(exists[row])
        hits = np.flatnonzero(wanted[row, columns])
        before = len(prompt) + hits - 1
        _check_predictable(before, row)
        score_index.append(before + sequence.length)
        found.append(np.stack([np.zeros(len(hits), int), np.full(len(hits), row), columns[hits]]))
        # Nobody reads what comes after the last scored token
        tokens = np.concatenate([prompt, canvases[row, columns]])[: (before.max(initial=0)) + 1]
        if not len(tokens):
            raise ValueError("The batch has no tokens: there is nothing to run the model on.")
        sequence.add_clean(tokens, 0, row, row, [])
    return _finish(sequence, score_index, found, canvas_ids, (1, *canvas_ids.shape))
