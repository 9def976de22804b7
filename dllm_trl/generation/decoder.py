"""The decoding loop that block and full attention share: slots, sampling, commits, the end of a row."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessorList

from .forward import Span, execution_device, make_forward
from .progress import RolloutBar
from .samplers import TokenScores
from .samplers.common import entropy_of
from .sampling import draw, uniform
from .stopping import Stopping


@dataclass
class DecodingSettings:
    r"""
    Resolved parameters of one decoding run: every field has its final value.

    Args:
        block_length (`int`): Tokens denoised together, `W`. `None`: the whole response.
        quotas (`Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]`):
            `(step in the block, masked tokens, width of the block) -> tokens to commit`, per row.
        sampler (`Callable`): Remasking strategy with its parameters, see `dllm_trl.generation.samplers`.
        temperature (`float`): 0 is greedy.
        warpers (`LogitsProcessorList`): Filters that look at the scores only (top-k, top-p, min-p).
        place_rules (`Callable | None`): What depends on a token's place, see [`make_place_rules`].
        processors (`LogitsProcessorList`): Processors that look at the row's tokens.
        watermark (`LogitsProcessorList`): The processor that comes last.
        stopping (`Stopping`): Asked at the end of a block.
        deadline (`float | None`): When all rows end as they are, in seconds since the epoch; asked after each step.
        suppressed (`torch.LongTensor`): Ids that are never sampled, the mask token among them.
        suppress_eos (`bool`): Whether EOS has no probability at all, neither as a token nor in a confidence.
        alg_temp (`float`): Noise in the ranking of the positions, 0 for none.
        cfg_scale (`float`), cache (`str`), refresh_interval (`int | None`): Of full attention, see [`CanvasDecoder`].
        mask_token_id, pad_token_id (`int`), eos_token_ids (`np.ndarray`): Special tokens.
        seed (`int`): Seed of the run; row `i` of a prompt draws from (seed, prompt index, i).
        record_entropies (`bool`): Whether each token's entropy is recorded when it is committed.
    """

    block_length: int | None
    quotas: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    sampler: Callable
    temperature: float
    warpers: LogitsProcessorList
    place_rules: Callable[..., torch.Tensor] | None
    processors: LogitsProcessorList
    watermark: LogitsProcessorList
    stopping: Stopping
    deadline: float | None
    suppressed: torch.Tensor
    suppress_eos: bool
    alg_temp: float
    cfg_scale: float
    cache: str
    refresh_interval: int | None
    mask_token_id: int
    pad_token_id: int
    eos_token_ids: np.ndarray
    seed: int
    record_entropies: bool = False


@dataclass
class Row:
    """A response being made: its prompt, whose masks are filled on the way, its limit, and what it committed in the
    blocks so far (response-relative)."""

    prompt: np.ndarray
    limit: int
    key: np.uint64
    index: int = 0  # in the batch
    prefix: bytes = b""  # names the whole blocks of the prompt
    forwards: int = 0
    canvas_length: int = 0
    length: int = 0

    def __post_init__(self):
        self.prompt = self.prompt.copy()  # each sibling fills its masks in its own way
        self.ids = np.zeros(self.limit, dtype=np.int64)
        self.steps = np.full(self.limit, -1, dtype=np.int64)
        self.logprobs = np.zeros(self.limit, dtype=np.float32)
        self.entropies = np.zeros(self.limit, dtype=np.float32)


def _slot_dtype(width: int) -> np.dtype:
    return np.dtype(
        [
            ("start", np.int64),  # first position of the block
            ("stop", np.int64),  # first position after it
            ("end", np.int64),  # positions from here on do not exist for the row
            ("key", np.uint64),  # of the row's draws
            ("step", np.int64),  # forwards of this block
            ("forwards", np.int64),  # forwards of the row
            ("commits", np.int64),  # those of them that committed something
            ("pending", np.bool_),  # the previous block waits for its commit
            ("previous", np.int64, (width,)),
            ("canvas", np.int64, (width,)),
            ("given", np.bool_, (width,)),  # known when the block was opened
            ("masked", np.bool_, (width,)),
            ("steps", np.int64, (width,)),
            ("logprobs", np.float32, (width,)),
            ("entropies", np.float32, (width,)),
        ],
        align=True,
    )


class Decoder(ABC):
    r"""
    One step after the other over the rows in flight, each of which holds one block:

    1. **Fill.** Free slots take the next rows.
    2. **Forward.** What it computes is the subclass's business ([`BlockDecoder`], [`CanvasDecoder`]): logits of masked
       positions.
    3. **Sample** a token at every one of them, from a generator keyed by (seed, position, step).
    4. **Commit** what the remasking strategy picks; the others stay masked.
    5. **Advance** rows whose block is full: end at EOS, at the row's limit or where a stopping criterion says so, else
       move on to the next block. Freed slots are filled again in 1.

    Args:
        model (`nn.Module`): A diffusion language model.
        settings ([`DecodingSettings`]): Resolved parameters.
        fused (`bool`, *optional*): Forces the fused or the stock forward.
        streamer (`BaseStreamer`, *optional*): For one row: receives finished tokens and, if it can, draft canvases.
        show_progress (`bool`, *optional*): Whether a bar shows how far the rows are.
    """

    def __init__(
        self, model, settings: DecodingSettings, fused: bool | None = None, streamer=None, show_progress: bool = False
    ):
        self.model, self.settings, self.streamer, self.show_progress = model, settings, streamer, show_progress
        self.forward = make_forward(model, fused)
        self.device = execution_device(model)

    def run(self, rows: list[Row], num_slots: int) -> None:
        """Decodes `rows`, in place."""
        self.width = self._width(rows)
        count = min(num_slots, len(rows))
        self.slots = np.zeros(count, dtype=_slot_dtype(self.width))
        self.rows: list[Row] = []  # in flight: the row of slot 0, 1, ...
        self._reserve(rows, count)
        waiting = list(reversed(rows))
        with RolloutBar(len(rows), self.show_progress) as bar:
            while waiting or self.rows:
                if waiting and len(self.rows) < count:
                    taken = [waiting.pop() for _ in range(min(count - len(self.rows), len(waiting)))]
                    taken.sort(key=lambda row: len(row.prompt))  # neighbours see about as many keys
                    self._fill(taken)
                active = len(self.rows)
                bar.step(self._step(), forwards=active)
                if self.settings.deadline is not None and time.time() > self.settings.deadline:
                    waiting.clear()
                    for slot in reversed(range(len(self.rows))):
                        self._cut(slot)
                bar.update(active - len(self.rows))

    def _width(self, rows: list[Row]) -> int:
        """Positions that a slot holds at a time: those of the widest block."""
        return self.settings.block_length

    @abstractmethod
    def _reserve(self, rows: list[Row], count: int) -> None:
        """Memory for `count` slots, each of which takes any of `rows`."""

    @abstractmethod
    def _fill(self, taken: list[Row]) -> None:
        """Gives each row of `taken` a slot of its own."""

    def _candidates(self, slots: np.ndarray) -> np.ndarray:
        """Masked positions `(A, W)` whose token the next forward predicts."""
        return slots["masked"]

    def _block_widths(self, slots: np.ndarray) -> np.ndarray | int:
        """Width of the block, of which the schedule takes its share."""
        return self.settings.block_length

    @abstractmethod
    def _logits(self, slots: np.ndarray, read: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        One forward: logits `(n, V)` for `read` `(n,)`, positions of the slots' blocks laid end to end (`slot * W +
        column`), and, where these are guided, the ones a trainer computes.
        """

    def _begin(self, row: Row) -> int:
        """The next free slot, now `row`'s."""
        slot = len(self.rows)
        self.rows.append(row)
        self.slots[slot] = np.zeros((), dtype=self.slots.dtype)
        self.slots["key"][slot], self.slots["end"][slot] = row.key, len(row.prompt) + row.limit
        return slot

    def _open(self, slot: int, start: int, stop: int, head: np.ndarray) -> None:
        """A new block from `start` to `stop`, which begins with the tokens `head`; masks among them get filled."""
        block, mask = self.slots[slot], self.settings.mask_token_id
        stop = min(stop, int(block["end"]))
        block["start"], block["stop"], block["step"] = start, stop, 0
        block["steps"], block["logprobs"], block["entropies"] = -1, 0, 0
        block["canvas"] = mask
        block["canvas"][: len(head)] = head
        block["given"] = block["canvas"] != mask
        block["masked"] = ~block["given"] & (np.arange(self.width) < stop - start)

    def _step(self) -> int:
        """Returns how many tokens were committed."""
        settings, width, slots = self.settings, self.width, self.slots[: len(self.rows)]
        start, masked, candidates = slots["start"], slots["masked"], self._candidates(slots)
        read = candidates.reshape(-1).nonzero()[0]
        logits, conditional = self._logits(slots, read)

        row_of = read // width
        positions = start[row_of] + read % width
        tokens, log_probs, entropies, scores = self._sample(logits, conditional, slots, candidates, row_of, positions)
        quota = self._quotas(slots, candidates)
        commit = settings.sampler(scores, scores.masked, self._tensor(quota)).cpu().numpy()  # (A, W)
        chosen = commit[candidates]
        slots["canvas"][commit] = tokens[chosen]
        slots["logprobs"][commit] = log_probs[chosen]
        if entropies is not None:
            slots["entropies"][commit] = entropies[chosen]
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
        return int(commit.sum())

    def _quotas(self, slots: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        return self.settings.quotas(slots["step"], candidates.sum(-1), self._block_widths(slots))

    def _spans(self, visible: np.ndarray, slots: np.ndarray, offset: int = 0) -> list[Span]:
        # On CPU few rows at a time see only as many keys as they need; elsewhere one launch for all is better
        size = 8 if self.device.type == "cpu" else len(visible)
        spans = []
        for first in range(0, len(visible), size):
            seen, lines = visible[first : first + size], slots[first : first + size]
            longest, count = int(seen.max()), len(seen)
            slot = int(lines[0]) if lines[-1] - lines[0] == count - 1 else None  # slots are in order
            spans.append(Span(offset + first, offset + first + count, longest, bool(seen.min() < longest), slot))
        return spans

    def _sample(self, logits, conditional, slots, candidates, row_of, positions):
        """
        A token for each position of `logits`, its log-probability, where they are recorded its entropy, and the scores
        for the strategy.
        """
        settings = self.settings
        if settings.suppress_eos:
            conditional = logits if conditional is None else conditional
            logits = logits.index_fill(
                -1, self._tensor(settings.eos_token_ids[settings.eos_token_ids >= 0]), -torch.inf
            )
        raw = logits
        if settings.temperature not in (0, 1):
            logits = logits / settings.temperature
        every = logits.log_softmax(-1)
        allowed = every.index_fill(-1, settings.suppressed, -torch.inf)
        if settings.processors or settings.place_rules is not None:
            allowed = raw.index_fill(-1, settings.suppressed, -torch.inf)
            if settings.place_rules is not None:
                place = positions - np.array([len(row.prompt) for row in self.rows])[row_of]
                last = positions == slots["end"][row_of] - 1
                ruled = settings.place_rules(allowed, *map(self._tensor, (place, positions, last)))
                allowed = ruled.where(self._tensor(place >= 0)[:, None], allowed)  # the response's, not the prompt's
            if settings.processors:
                allowed = self._process(settings.processors, allowed, row_of)
            allowed = allowed / (settings.temperature or 1)
        counters = slots["key"][row_of], positions, slots["step"][row_of]
        if settings.temperature > 0:
            allowed = settings.warpers(None, allowed)
        if settings.watermark:
            allowed = self._process(settings.watermark, allowed, row_of)
        if settings.temperature > 0:
            tokens = draw(allowed, self._tensor(uniform(*counters, 0)))
        else:
            tokens = allowed.argmax(-1)
        log_probs = recorded = every.gather(-1, tokens[:, None]).squeeze(-1)
        trainers = every
        if conditional is not None:
            trainers = (conditional / (settings.temperature or 1)).log_softmax(-1)
            recorded = trainers.gather(-1, tokens[:, None]).squeeze(-1)
        entropies = entropy_of(trainers).cpu().numpy() if settings.record_entropies else None
        # What cannot be a probability is noticed in numbers that go to the host anyway
        recorded = recorded.where(~log_probs.isnan(), torch.nan)
        tokens, recorded = tokens.cpu().numpy(), recorded.cpu().numpy()
        if np.isnan(recorded).any() and every.isnan().any():
            slot = int(row_of[np.isnan(recorded).argmax()])
            raise FloatingPointError(
                f"The model's logits are NaN or infinite in row {self.rows[slot].index}, denoising step "
                f"{slots['forwards'][slot]}, so there is no probability to sample from. The weights may have diverged "
                "in training (a lower `learning_rate` and `max_grad_norm` help), or the dtype is too narrow for the "
                "model: try `bfloat16` or `float32`."
            )
        masked = self._tensor(candidates)
        scores = TokenScores(
            masked,
            log_probs,
            every,
            lambda: self._tensor(uniform(*counters, 1)),
            settings.alg_temp,
            lambda: self._tensor(np.where(slots["steps"] >= 0, slots["logprobs"], np.float32(np.nan))),
        )
        return tokens, recorded, entropies, scores

    def _process(self, processors: LogitsProcessorList, logits: torch.Tensor, row_of: np.ndarray) -> torch.Tensor:
        """Logits processors, row by row: each sees the row's prompt and committed tokens once per masked position."""
        pieces = []
        for slot, scores in enumerate(logits.split(np.bincount(row_of, minlength=len(self.rows)).tolist())):
            self._store(slot)
            row, ids = self.rows[slot], self._context(slot).expand(len(scores), -1)
            prompt = self._tensor(row.prompt[None])
            pieces.append(processors(ids, scores, prompt_ids=prompt, batch_id=row.index))
        return torch.cat(pieces)

    def _context(self, slot: int) -> torch.Tensor:
        """Prompt and committed tokens of a row, `(1, length)`."""
        row = self.rows[slot]
        prompt = row.prompt[row.prompt != self.settings.mask_token_id]
        return self._tensor(np.concatenate([prompt, row.ids[row.steps >= 0]])[None])

    def _store(self, slot: int) -> tuple[int, int]:
        """Copies what a block committed to its row; returns where the block lies in the response."""
        row, block = self.rows[slot], self.slots[slot]
        shift = int(block["start"]) - len(row.prompt)
        first, last = max(shift, 0), int(block["stop"]) - len(row.prompt)
        own = slice(first - shift, last - shift)
        row.ids[first:last], row.steps[first:last] = block["canvas"][own], block["steps"][own]
        row.logprobs[first:last], row.entropies[first:last] = block["logprobs"][own], block["entropies"][own]
        return first, last

    def _advance(self, slot: int) -> None:
        """The block of `slot` is full: end the row or open its next block."""
        row = self.rows[slot]
        first, last = self._store(slot)
        row.canvas_length = last
        ended = self._finish(row, first, last)
        if ended or last == row.limit:
            self._close(slot)
        else:
            self._next(slot)

    def _cut(self, slot: int) -> None:
        """Time is up: what was committed without a gap is the response, the rest of the block stays context."""
        row = self.rows[slot]
        first, last = self._store(slot)
        committed = row.steps[first:last] >= 0
        row.canvas_length = last if committed.any() else first
        self._finish(row, first, first + int(np.append(committed, False).argmin()))
        self._close(slot)

    def _finish(self, row: Row, first: int, last: int) -> bool:
        """The response grows by the tokens `first:last`, up to EOS or where a stopping criterion ends it."""
        row.length = last
        ends = (row.ids[first:last, None] == self.settings.eos_token_ids).any(-1).nonzero()[0]
        if len(ends):
            row.length = first + int(ends[0]) + 1
        kept = None
        if self.settings.stopping and row.length > first:
            ids = self._tensor(row.prompt), self._tensor(row.ids[: row.length])
            kept = self.settings.stopping(row.index, *ids, first)
        row.length = row.length if kept is None else kept
        if self.streamer is not None and row.length > first:
            self.streamer.put(torch.from_numpy(row.ids[first : row.length][None]))
        return bool(len(ends)) or kept is not None

    def _next(self, slot: int) -> None:
        """Opens the block after the one that is full."""
        start = int(self.slots["stop"][slot])
        self._open(slot, start, start + self.settings.block_length, np.zeros(0, dtype=np.int64))

    def _close(self, slot: int) -> None:
        """Frees a slot; the last row in flight moves there, so that rows in flight are slots 0, 1, ..."""
        row, last = self.rows[slot], len(self.rows) - 1
        row.forwards = int(self.slots["forwards"][slot])
        if slot != last:
            self._move(last, slot)
            self.slots[slot], self.rows[slot] = self.slots[last], self.rows[last]
        self.rows.pop()

    @abstractmethod
    def _move(self, source: int, target: int) -> None:
        """What a slot holds in memory of the subclass goes to another one."""

    def _dtype(self) -> torch.dtype:
        """What keys and values are stored in."""
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if autocast else self.model.get_input_embeddings().weight.dtype

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
