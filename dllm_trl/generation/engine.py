"""Many prompts through a fixed number of slots: refill of finished slots, one prefill per group of siblings."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import LogitsProcessorList

from ..types import DiffusionRollout
from .cache import Prefix, SlotCache
from .forward import Units, make_forward
from .samplers import TokenScores
from .sampling import draw, mix, uniform


@dataclass
class DecodingPlan:
    r"""
    Resolved parameters of one decoding run: every field has its final value.

    Args:
        block_length (`int`): Tokens denoised together, `W`.
        quotas (`Callable[[np.ndarray, np.ndarray], np.ndarray]`):
            `(step in the block, masked tokens) -> tokens to commit`, per row.
        sampler (`Callable`): Remasking strategy, see `dllm_trl.generation.samplers`.
        confidence_threshold, entropy_bound (`float`): Parameters of the strategies.
        temperature (`float`): 0 is greedy.
        warpers (`LogitsProcessorList`): Filters that look at the scores only (top-k, top-p, min-p).
        processors (`LogitsProcessorList`): Processors that look at the row's tokens.
        stopping (`Callable[[torch.LongTensor], bool] | None`): Called with `(1, length)` at the end of a block.
        suppressed (`torch.LongTensor`): Ids that are never sampled, the mask token among them.
        mask_token_id, pad_token_id (`int`), eos_token_ids (`np.ndarray`): Special tokens.
        seed (`int`): Seed of the run; row `i` of a prompt draws from (seed, prompt index, i).
    """

    block_length: int
    quotas: Callable[[np.ndarray, np.ndarray], np.ndarray]
    sampler: Callable
    confidence_threshold: float
    entropy_bound: float
    temperature: float
    warpers: LogitsProcessorList
    processors: LogitsProcessorList
    stopping: Callable[[torch.Tensor], bool] | None
    suppressed: torch.Tensor
    mask_token_id: int
    pad_token_id: int
    eos_token_ids: np.ndarray
    seed: int


@dataclass
class _Row:
    """A response being made: its prompt, its limit, and what it committed so far (response-relative)."""

    prompt: np.ndarray
    limit: int
    key: np.uint64
    ids: np.ndarray = field(init=False)
    steps: np.ndarray = field(init=False)
    logprobs: np.ndarray = field(init=False)
    forwards: int = 0
    commits: int = 0
    canvas_length: int = 0
    length: int = 0

    def __post_init__(self):
        self.ids = np.zeros(self.limit, dtype=np.int64)
        self.steps = np.full(self.limit, -1, dtype=np.int64)
        self.logprobs = np.zeros(self.limit, dtype=np.float32)


class Decoder:
    r"""
    The decoding loop of block diffusion. A row in flight holds one block; all rows share one forward per step:

    1. **Fill.** Free slots take the next rows. The full blocks of a prompt are computed once (`prefill`) and copied
    into
       the slot of each sibling; what is left of the prompt is the revealed head of the first block.
    2. **Forward.** `[finished block b | masks of block b+1]` for a row whose block was just finished, `[block]` for
    the
       others: committing a block to the cache costs no forward of its own, and a row's last block is never committed.
    3. **Sample** a token at every masked position, from a generator keyed by (seed, position, step).
    4. **Commit** what the remasking strategy picks; the others stay masked.
    5. **Advance** rows whose block is full: end at EOS, at the row's limit or where a stopping criterion says so, else
       move on to the next block. Freed slots are filled again in 1.

    ```
    forward     1     2     3     4     5     6          row 0: 2 + 3 denoising steps, 5 forwards
    row 0     [b1]  [b1]  [b1|b2] [b2] [b2]  (end)       the commit of b1 rides on the first step of b2
    ```

    Args:
        model (`nn.Module`): A model of a block family.
        plan ([`DecodingPlan`]): Resolved parameters.
        fused (`bool`, *optional*): Forces the fused or the stock forward.
        streamer (`BaseStreamer`, *optional*): For one row: receives finished tokens and, if it can, draft canvases.
    """

    def __init__(self, model, plan: DecodingPlan, fused: bool | None = None, streamer=None):
        self.model, self.plan, self.streamer = model, plan, streamer
        self.forward = make_forward(model, fused)
        self.device = model.get_input_embeddings().weight.device

    def run(self, rows: list[_Row], num_slots: int) -> None:
        """Decodes `rows`, in place."""
        _plan, width = self.plan, self.plan.block_length
        slots = min(num_slots, len(rows))
        # One block beyond the longest row: the last block may be wider than what the row may still generate
        length = max(len(row.prompt) + row.limit for row in rows) // width * width + width
        parameter = self.model.get_input_embeddings().weight
        self.cache = SlotCache(self.model.config, slots, length, parameter.dtype, parameter.device)
        self.forward.reserve(length)
        self.rows: list[_Row] = []  # in flight: row of slot 0, 1, ...
        self.start = np.zeros(slots, dtype=np.int64)  # first position of the block
        self.end = np.zeros(slots, dtype=np.int64)  # positions from here on do not exist for the row
        self.step_in_block = np.zeros(slots, dtype=np.int64)
        self.keys = np.zeros(slots, dtype=np.uint64)
        self.pending = np.zeros(slots, dtype=bool)  # the previous block waits for its commit
        self.canvas = np.zeros((slots, width), dtype=np.int64)
        self.masked = np.zeros((slots, width), dtype=bool)
        self.previous = np.zeros((slots, width), dtype=np.int64)
        self.prefixes: dict[bytes, Prefix] = {}
        waiting = list(reversed(rows))
        while waiting or self.rows:
            if waiting and len(self.rows) < slots:
                self._fill(waiting, slots)
            self._step()

    def _fill(self, waiting: list[_Row], slots: int) -> None:
        width = self.plan.block_length
        taken = [waiting.pop() for _ in range(min(slots - len(self.rows), len(waiting)))]
        taken.sort(key=lambda row: len(row.prompt))  # neighbours see about as many keys
        heads = {}
        for row in taken:
            head = row.prompt[: len(row.prompt) // width * width]
            heads.setdefault(head.tobytes(), head)
        new = {key: head for key, head in heads.items() if key not in self.prefixes}
        tensors = [torch.from_numpy(head).to(self.device) for head in new.values()]
        self.prefixes.update(zip(new, self.forward.prefill(tensors, width), strict=True))
        for row in taken:
            slot = len(self.rows)
            self.rows.append(row)
            known = len(row.prompt) % width
            self.cache.load(slot, self.prefixes[row.prompt[: len(row.prompt) - known].tobytes()])
            self.end[slot], self.keys[slot] = len(row.prompt) + row.limit, row.key
            self._open(slot, len(row.prompt) - known, row.prompt[len(row.prompt) - known :])
            self.pending[slot] = False
        # Rows come in the order of their prompts: a prefix is needed as long as the next row has it
        upcoming = {row.prompt[: len(row.prompt) // width * width].tobytes() for row in waiting}
        self.prefixes = {key: prefix for key, prefix in self.prefixes.items() if key in upcoming}

    def _open(self, slot: int, start: int, known: np.ndarray) -> None:
        """A new block at `start` whose head `known` is revealed."""
        self.start[slot], self.step_in_block[slot] = start, 0
        self.canvas[slot] = self.plan.mask_token_id
        self.canvas[slot, : len(known)] = known
        positions = start + np.arange(self.plan.block_length)
        self.masked[slot] = (positions >= start + len(known)) & (positions < self.end[slot])

    def _step(self) -> None:
        plan, count, width = self.plan, len(self.rows), self.plan.block_length
        start, masked, canvas = self.start[:count], self.masked[:count], self.canvas[:count]
        committing = self.pending[:count].nonzero()[0]
        visible = np.minimum(start + width, self.end[:count])
        starts = np.concatenate([start, start[committing] - width])
        read = masked.reshape(-1).nonzero()[0]
        units = Units(
            ids=self._tensor(np.concatenate([canvas, self.previous[committing]])),
            positions=self._tensor(starts[:, None] + np.arange(width)),
            slots=self._tensor(np.concatenate([np.arange(count), committing])),
            visible=self._tensor(np.concatenate([visible, start[committing]])),
            rows=count,
            length=int(visible.max()),
            read=self._tensor(read),
            spans=self._spans(visible, count) + self._spans(start[committing], len(committing), count),
        )
        logits = self.forward.step(units, self.cache).float()  # (n, V)
        self.pending[:count] = False

        row_of, column_of = read // width, read % width
        step = self.step_in_block[:count]
        keys, positions = self.keys[row_of], (start[:, None] + np.arange(width))
        tokens, log_probs, scores = self._sample(
            logits, masked, keys, positions.reshape(-1)[read], step[row_of], row_of
        )
        quota = plan.quotas(step, masked.sum(-1))
        commit = plan.sampler(
            scores,
            scores.masked,
            self._tensor(quota),
            confidence_threshold=plan.confidence_threshold,
            entropy_bound=plan.entropy_bound,
        )
        commit = commit.cpu().numpy()
        chosen = commit[row_of, column_of]
        rows, columns = row_of[chosen], column_of[chosen]
        canvas[rows, columns] = tokens[chosen]
        masked[rows, columns] = False
        self.step_in_block[:count] += 1

        offsets = start[rows] + columns
        for slot in range(count):
            row = self.rows[slot]
            row.forwards += 1
        for slot, offset, token, log_prob in zip(
            rows.tolist(), offsets.tolist(), tokens[chosen].tolist(), log_probs[chosen].tolist(), strict=True
        ):
            row = self.rows[slot]
            offset -= len(row.prompt)
            row.ids[offset], row.steps[offset], row.logprobs[offset] = token, row.commits, log_prob
        for slot in np.unique(rows).tolist():
            self.rows[slot].commits += 1
        if self.streamer is not None and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(torch.tensor(canvas[:1, : self.end[0] - start[0]]))
        # From the last slot to the first, so that closing one leaves the smaller slots where they are
        for slot in (~masked.any(-1)).nonzero()[0][::-1].tolist():
            self._advance(slot)

    def _spans(self, visible: np.ndarray, count: int, offset: int = 0) -> list[tuple[int, int, int, bool]]:
        # On CPU few rows at a time see only as many keys as they need; elsewhere one launch for all is better
        size = 8 if self.device.type == "cpu" else count
        spans = []
        for first in range(0, count, size or 1):
            seen = visible[first : first + size]
            longest = int(seen.max())
            spans.append((offset + first, offset + first + len(seen), longest, bool(seen.min() < longest)))
        return spans

    def _sample(self, logits, masked, keys, positions, step, row_of):
        """A token for each masked position, its log-probability, and the scores for the strategy."""
        plan = self.plan
        if plan.temperature not in (0, 1):
            logits = logits / plan.temperature
        every = logits.log_softmax(-1)
        allowed = every.index_fill(-1, plan.suppressed, -torch.inf)
        if plan.processors:
            allowed = self._process(logits.index_fill(-1, plan.suppressed, -torch.inf), row_of)
        if plan.temperature > 0:
            if plan.warpers:
                allowed = plan.warpers(None, allowed)
            tokens = draw(allowed, self._tensor(uniform(keys, positions, step, 0)))
        else:
            tokens = allowed.argmax(-1)
        log_probs = every.gather(-1, tokens[:, None]).squeeze(-1)
        scores = TokenScores(
            self._tensor(masked), log_probs, every, lambda: self._tensor(uniform(keys, positions, step, 1))
        )
        return tokens.cpu().numpy(), log_probs.cpu().numpy(), scores

    def _process(self, logits: torch.Tensor, row_of: np.ndarray) -> torch.Tensor:
        """Logits processors, row by row: each sees the row's prompt and committed tokens once per masked position."""
        pieces = []
        for slot, scores in enumerate(logits.split(np.bincount(row_of, minlength=len(self.rows)).tolist())):
            pieces.append(self.plan.processors(self._context(slot).expand(len(scores), -1), scores))
        return torch.cat(pieces)

    def _context(self, slot: int) -> torch.Tensor:
        """Prompt and committed tokens of a row, `(1, length)`."""
        row = self.rows[slot]
        return self._tensor(np.concatenate([row.prompt, row.ids[row.steps >= 0]])[None])

    def _advance(self, slot: int) -> None:
        """The block of `slot` is full: end the row or open its next block."""
        row, width, start = self.rows[slot], self.plan.block_length, int(self.start[slot])
        first = max(start - len(row.prompt), 0)  # first response token of the block
        row.canvas_length = row.length = min(start + width, int(self.end[slot])) - len(row.prompt)
        ends = np.isin(row.ids[first : row.canvas_length], self.plan.eos_token_ids).nonzero()[0]
        if len(ends):
            row.length = first + int(ends[0]) + 1
        if self.streamer is not None:
            self.streamer.put(torch.from_numpy(row.ids[first : row.length][None]))
        if (
            len(ends)
            or row.canvas_length == row.limit
            or (self.plan.stopping and self.plan.stopping(self._context(slot)))
        ):
            self._close(slot)
            return
        self.previous[slot] = self.canvas[slot]
        self.pending[slot] = True
        self._open(slot, start + width, np.zeros(0, dtype=np.int64))

    def _close(self, slot: int) -> None:
        """Frees a slot; the last row in flight moves there, so that rows in flight are slots 0, 1, ..."""
        last = len(self.rows) - 1
        if slot != last:
            self.cache.move(last, slot, int(self.start[last]))
            for array in (self.start, self.end, self.step_in_block, self.keys, self.pending):
                array[slot] = array[last]
            for array in (self.canvas, self.masked, self.previous):
                array[slot] = array[last]
            self.rows[slot] = self.rows[last]
        self.rows.pop()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


@torch.no_grad()
def decode(
    model,
    prompts: list[np.ndarray],
    limits: list[int],
    plan: DecodingPlan,
    num_generations: int = 1,
    num_slots: int | None = None,
    index_offset: int = 0,
    fused: bool | None = None,
    streamer=None,
) -> DiffusionRollout:
    """Decodes `num_generations` responses to each prompt, siblings adjacent, and lays them out as a rollout on CPU."""
    rows = [
        _Row(prompt, limit, mix(plan.seed, index_offset + i, sibling))
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        for sibling in range(num_generations)
    ]
    Decoder(model, plan, fused, streamer).run(rows, num_slots or len(rows))
    batch, width = len(rows), max(row.canvas_length for row in rows)
    prompt_width = max(len(row.prompt) for row in rows)
    shape = (batch, width)
    prompt_ids = np.full((batch, prompt_width), plan.pad_token_id)
    prompt_mask = np.zeros((batch, prompt_width), dtype=np.int64)
    completion_ids, canvas_ids = np.full(shape, plan.pad_token_id), np.full(shape, plan.pad_token_id)
    completion_mask, canvas_mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    step_map, logprobs = np.full(shape, -1), np.zeros(shape, dtype=np.float32)
    for i, row in enumerate(rows):
        prompt_ids[i, prompt_width - len(row.prompt) :] = row.prompt
        prompt_mask[i, prompt_width - len(row.prompt) :] = 1
        completion_ids[i, : row.length], completion_mask[i, : row.length] = row.ids[: row.length], 1
        seen = slice(0, row.canvas_length)
        canvas_ids[i, seen], canvas_mask[i, seen] = row.ids[seen], 1
        step_map[i, seen], logprobs[i, seen] = row.steps[seen], row.logprobs[seen]
    tensors = (prompt_ids, prompt_mask, completion_ids, completion_mask, canvas_ids, canvas_mask, step_map, logprobs)
    forwards = torch.tensor([row.forwards for row in rows])
    return DiffusionRollout(*map(torch.from_numpy, tensors), forwards, plan.block_length)
