"""Many prompts through a fixed number of slots: refill of finished slots, one prefill per group of siblings."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

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
    """A response being made: its prompt, its limit, and what it committed in the blocks so far (response-relative)."""

    prompt: np.ndarray
    limit: int
    key: np.uint64
    prefix: bytes = b""  # names the whole blocks of the prompt
    forwards: int = 0
    canvas_length: int = 0
    length: int = 0

    def __post_init__(self):
        self.ids = np.zeros(self.limit, dtype=np.int64)
        self.steps = np.full(self.limit, -1, dtype=np.int64)
        self.logprobs = np.zeros(self.limit, dtype=np.float32)


def _slot_dtype(width: int) -> np.dtype:
    return np.dtype(
        [
            ("start", np.int64),  # first position of the block
            ("end", np.int64),  # positions from here on do not exist for the row
            ("key", np.uint64),  # of the row's draws
            ("step", np.int64),  # forwards of this block
            ("forwards", np.int64),  # forwards of the row
            ("commits", np.int64),  # those of them that committed something
            ("pending", np.bool_),  # the previous block waits for its commit
            ("previous", np.int64, (width,)),
            ("canvas", np.int64, (width,)),
            ("masked", np.bool_, (width,)),
            ("steps", np.int64, (width,)),
            ("logprobs", np.float32, (width,)),
        ],
        align=True,
    )


class Decoder:
    r"""
    The decoding loop of block diffusion. A row in flight holds one block; all rows share one forward per step:

    1. **Fill.** Free slots take the next rows. The whole blocks of a prompt are computed once (`prefill`) and copied
       into the slot of each sibling; what is left of the prompt is the revealed head of the first block.
    2. **Forward.** `[finished block b | masks of block b+1]` for a row whose block was just finished, `[block]` for
       the others: committing a block to the cache costs no forward of its own, and a row's last block is never
       committed.
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
        width = self.plan.block_length
        count = min(num_slots, len(rows))
        # One block beyond the longest row: the last block may be wider than what the row may still generate
        length = max(len(row.prompt) + row.limit for row in rows) // width * width + width
        dtype, kind = self.model.get_input_embeddings().weight.dtype, self.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        self.cache = SlotCache(self.model.config, count, length, dtype, self.device)
        self.forward.reserve(length)
        self.slots = np.zeros(count, dtype=_slot_dtype(width))
        self.rows: list[_Row] = []  # in flight: the row of slot 0, 1, ...
        self.prefixes: dict[bytes, Prefix] = {}
        for row in rows:
            row.prefix = row.prompt[: len(row.prompt) // width * width].tobytes()
        self.users = Counter(row.prefix for row in rows)  # rows that still have to load each prefix
        waiting = list(reversed(rows))
        while waiting or self.rows:
            if waiting and len(self.rows) < count:
                self._fill(waiting)
            self._step()

    def _fill(self, waiting: list[_Row]) -> None:
        width = self.plan.block_length
        taken = [waiting.pop() for _ in range(min(len(self.slots) - len(self.rows), len(waiting)))]
        taken.sort(key=lambda row: len(row.prompt))  # neighbours see about as many keys
        new = list(dict.fromkeys(row.prefix for row in taken if row.prefix not in self.prefixes))
        heads = [torch.from_numpy(np.frombuffer(prefix, dtype=np.int64).copy()).to(self.device) for prefix in new]
        self.prefixes.update(zip(new, self.forward.prefill(heads, width), strict=True))
        for row in taken:
            slot = len(self.rows)
            self.rows.append(row)
            self.cache.load(slot, self.prefixes[row.prefix])
            self.users[row.prefix] -= 1
            if not self.users[row.prefix]:
                del self.prefixes[row.prefix]
            known = len(row.prompt) % width
            self.slots[slot] = np.zeros((), dtype=self.slots.dtype)
            self.slots["key"][slot], self.slots["end"][slot] = row.key, len(row.prompt) + row.limit
            self._open(slot, len(row.prompt) - known, row.prompt[len(row.prompt) - known :])

    def _open(self, slot: int, start: int, known: np.ndarray) -> None:
        """A new block at `start` whose head `known` is revealed."""
        block = self.slots[slot]
        block["start"], block["step"], block["steps"] = start, 0, -1
        block["canvas"] = self.plan.mask_token_id
        block["canvas"][: len(known)] = known
        block["masked"] = False
        block["masked"][len(known) : block["end"] - start] = True

    def _step(self) -> None:
        plan, width, slots = self.plan, self.plan.block_length, self.slots[: len(self.rows)]
        start, masked = slots["start"], slots["masked"]
        units, read = self._units(slots)
        logits = self.forward.step(units, self.cache).float()  # (n, V)
        slots["pending"] = False

        row_of = read // width
        tokens, log_probs, scores = self._sample(logits, slots, row_of, start[row_of] + read % width)
        quota = plan.quotas(slots["step"], masked.sum(-1))
        commit = plan.sampler(
            scores,
            scores.masked,
            self._tensor(quota),
            confidence_threshold=plan.confidence_threshold,
            entropy_bound=plan.entropy_bound,
        )
        commit = commit.cpu().numpy()  # (A, W)
        chosen = commit[masked]
        slots["canvas"][commit] = tokens[chosen]
        slots["logprobs"][commit] = log_probs[chosen]
        slots["steps"][commit] = np.repeat(slots["commits"], commit.sum(-1))
        masked &= ~commit
        slots["step"] += 1
        slots["forwards"] += 1
        slots["commits"] += commit.any(-1)
        if self.streamer is not None and hasattr(self.streamer, "put_draft"):
            draft = slice(max(len(self.rows[0].prompt) - start[0], 0), slots["end"][0] - start[0])
            self.streamer.put_draft(torch.tensor(slots["canvas"][:, draft]))
        # From the last slot to the first, so that closing one leaves the smaller slots where they are
        for slot in (~masked.any(-1)).nonzero()[0][::-1].tolist():
            self._advance(slot)

    def _units(self, slots: np.ndarray) -> tuple[Units, np.ndarray]:
        """What the next forward computes, and which of its first `A * W` tokens are masked."""
        start, width, count = slots["start"], self.plan.block_length, len(slots)
        ids, rows, starts = slots["canvas"], np.arange(count), start
        visible = np.minimum(start + width, slots["end"])
        spans = self._spans(visible)
        committing = slots["pending"].nonzero()[0]
        if len(committing):
            ids = np.concatenate([ids, slots["previous"][committing]])
            rows = np.concatenate([rows, committing])
            starts = np.concatenate([start, start[committing] - width])
            spans += self._spans(start[committing], count)
            visible = np.concatenate([visible, start[committing]])
        read = slots["masked"].reshape(-1).nonzero()[0]
        units = Units(
            ids=self._tensor(ids),
            positions=self._tensor(starts[:, None] + np.arange(width)),
            slots=self._tensor(rows),
            visible=self._tensor(visible),
            rows=count,
            length=int(visible.max()),
            read=self._tensor(read),
            spans=spans,
        )
        return units, read

    def _spans(self, visible: np.ndarray, offset: int = 0) -> list[tuple[int, int, int, bool]]:
        # On CPU few rows at a time see only as many keys as they need; elsewhere one launch for all is better
        size = 8 if self.device.type == "cpu" else len(visible)
        spans = []
        for first in range(0, len(visible), size):
            seen = visible[first : first + size]
            longest = int(seen.max())
            spans.append((offset + first, offset + first + len(seen), longest, bool(seen.min() < longest)))
        return spans

    def _sample(self, logits: torch.Tensor, slots: np.ndarray, row_of: np.ndarray, positions: np.ndarray):
        """A token for each masked position, its log-probability, and the scores for the strategy."""
        plan = self.plan
        if plan.temperature not in (0, 1):
            logits = logits / plan.temperature
        every = logits.log_softmax(-1)
        allowed = every.index_fill(-1, plan.suppressed, -torch.inf)
        if plan.processors:
            allowed = self._process(logits.index_fill(-1, plan.suppressed, -torch.inf), row_of)
        counters = slots["key"][row_of], positions, slots["step"][row_of]
        if plan.temperature > 0:
            if plan.warpers:
                allowed = plan.warpers(None, allowed)
            tokens = draw(allowed, self._tensor(uniform(*counters, 0)))
        else:
            tokens = allowed.argmax(-1)
        log_probs = every.gather(-1, tokens[:, None]).squeeze(-1)
        masked = self._tensor(slots["masked"])
        scores = TokenScores(masked, log_probs, every, lambda: self._tensor(uniform(*counters, 1)))
        return tokens.cpu().numpy(), log_probs.cpu().numpy(), scores

    def _process(self, logits: torch.Tensor, row_of: np.ndarray) -> torch.Tensor:
        """Logits processors, row by row: each sees the row's prompt and committed tokens once per masked position."""
        pieces = []
        for slot, scores in enumerate(logits.split(np.bincount(row_of, minlength=len(self.rows)).tolist())):
            self._store(slot)
            pieces.append(self.plan.processors(self._context(slot).expand(len(scores), -1), scores))
        return torch.cat(pieces)

    def _context(self, slot: int) -> torch.Tensor:
        """Prompt and committed tokens of a row, `(1, length)`."""
        row = self.rows[slot]
        return self._tensor(np.concatenate([row.prompt, row.ids[row.steps >= 0]])[None])

    def _store(self, slot: int) -> tuple[int, int]:
        """Copies what a block committed to its row; returns where the block lies in the response."""
        row, block = self.rows[slot], self.slots[slot]
        shift = int(block["start"]) - len(row.prompt)
        first, last = max(shift, 0), min(shift + self.plan.block_length, row.limit)
        own = slice(first - shift, last - shift)
        row.ids[first:last], row.steps[first:last] = block["canvas"][own], block["steps"][own]
        row.logprobs[first:last] = block["logprobs"][own]
        return first, last

    def _advance(self, slot: int) -> None:
        """The block of `slot` is full: end the row or open its next block."""
        row, block = self.rows[slot], self.slots[slot]
        first, last = self._store(slot)
        row.canvas_length = row.length = last
        ends = (row.ids[first:last, None] == self.plan.eos_token_ids).any(-1).nonzero()[0]
        if len(ends):
            row.length = first + int(ends[0]) + 1
        if self.streamer is not None:
            self.streamer.put(torch.from_numpy(row.ids[first : row.length][None]))
        stopped = self.plan.stopping is not None and self.plan.stopping(self._context(slot))
        if len(ends) or last == row.limit or stopped:
            self._close(slot)
            return
        block["previous"], block["pending"] = block["canvas"], True
        self._open(slot, int(block["start"]) + self.plan.block_length, np.zeros(0, dtype=np.int64))

    def _close(self, slot: int) -> None:
        """Frees a slot; the last row in flight moves there, so that rows in flight are slots 0, 1, ..."""
        row, last = self.rows[slot], len(self.rows) - 1
        row.forwards = int(self.slots["forwards"][slot])
        if slot != last:
            self.cache.move(last, slot, int(self.slots["start"][last]))
            self.slots[slot], self.rows[slot] = self.slots[last], self.rows[last]
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
