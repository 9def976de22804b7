"""What the trainers log: ratios of sums over all that was seen between two logs, whatever batches it came in."""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


# Metrics that are an extreme of all values, not their mean
EXTREMES = {
    "completions/min_length": min,
    "completions/max_length": max,
    "completions/min_terminated_length": min,
    "completions/max_terminated_length": max,
    "clip_ratio/low_min": min,
    "clip_ratio/high_max": max,
    "sampling/sampling_logp_difference/max": max,
}


def reduce_metric(name: str, values: Sequence[float], counts: Sequence[float]) -> float:
    """
    The one value to log of some, each standing for `counts` tokens or rows. Without any it is NaN, or as in TRL 0 for
    lengths of responses that ended.
    """
    values, counts = np.array(values), np.array(counts)
    known = ~np.isnan(values) & (counts > 0)
    values, counts = values[known], counts[known]
    if not len(values):
        return 0.0 if name.endswith("_terminated_length") else math.nan
    if name in EXTREMES:
        return float(EXTREMES[name](values))
    if name == "reward_std" or (name.startswith("rewards/") and name.endswith("/std")):  # of rows
        return float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return float((values * counts).sum() / counts.sum())


def new_notes() -> dict[str, dict[str, tuple[array, array]]]:
    """Per mode and name of a metric: values and their counts."""
    return {mode: defaultdict(lambda: (array("d"), array("d"))) for mode in ("train", "eval")}


class RatioMetricsMixin:
    """
    For a [`~trl.SFTTrainer`] or [`~trl.GRPOTrainer`], whose `_metrics` are lists that `log` averages: values that do
    not stand for equally much are noted here with their counts, and `log` finds one value of each in its list. So a
    metric is the same for every batch size, number of accumulation steps and number of processes. The trainer sets
    `_notes` to [`new_notes`]. Mixed in before the trainer's class.
    """

    def _note(self, name: str, value: float, count: float = 1.0) -> None:
        """Notes a value that is the same on all processes and stands for `count` tokens or rows of all of them."""
        values, counts = self._notes[self._mode][name]
        values.append(value)
        counts.append(count)

    def _note_ratios(self, sums: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Notes `{name: (total, count)}`, 0-d tensors of this process."""
        pairs = torch.stack([torch.stack([total, count.to(total)]).float() for total, count in sums.values()])
        for name, (total, count) in zip(sums, self.accelerator.reduce(pairs, "sum").tolist(), strict=True):
            if count > 0:
                self._note(name, total / count, count)

    def _note_rows(self, rows: dict[str, torch.Tensor], counted: torch.Tensor) -> None:
        """Notes `{name: (n,)}`, a value of each of this process's rows that are `counted`; NaN counts for nothing."""
        table = torch.stack([counted, *rows.values()], dim=1).float()
        counted, *columns = self.accelerator.gather(table).unbind(1)
        for name, column in zip(rows, columns, strict=True):
            values, counts = self._notes[self._mode][name]
            values.extend(column[counted.bool()].tolist())
            counts.extend([1.0] * (len(values) - len(counts)))

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @contextmanager
    def _appended(self) -> Iterator[dict[str, list[float]]]:
        """What TRL adds to its metrics in this context, kept apart from what is logged."""
        mode = self._mode
        kept = self._metrics[mode]
        self._metrics[mode] = defaultdict(list)
        try:
            yield self._metrics[mode]
        finally:
            self._metrics[mode] = kept

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        notes = self._notes[self._mode]
        for name, (values, counts) in notes.items():
            self._metrics[self._mode][name] = [reduce_metric(name, values, counts)]
        notes.clear()
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._notes["eval"].clear()  # of a `predict`, which logs nothing
        self._metrics["eval"].clear()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        if "loss" in self._notes["eval"]:
            # transformers averages the losses of the batches, whatever they hold
            values, counts = map(np.array, self._notes["eval"].pop("loss"))
            finite = np.isfinite(values) | (not self.args.logging_nan_inf_filter)
            finite |= not finite.any()
            output.metrics[f"{metric_key_prefix}_loss"] = reduce_metric("loss", values[finite], counts[finite])
        return output
