"""The tables of `log_completions`: one for training and one for each evaluation at the same step."""

from collections import defaultdict, deque
from pathlib import Path


class CompletionTablesMixin:
    """
    For a [`~trl.GRPOTrainer`], which collects the completions of training and evaluation in one place and writes them
    to one file per step: an evaluation has its own of both. Mixed in before the trainer's class.
    """

    _evaluation = None  # prefix of the running evaluation's metrics

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        kept = self._logs, self._evaluation
        self._logs = {
            name: deque(maxlen=log.maxlen) if isinstance(log, deque) else defaultdict(log.default_factory)
            for name, log in self._logs.items()
        }
        self._evaluation = metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._logs, self._evaluation = kept

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._evaluation is None or not (self.log_completions and self.accelerator.is_main_process):
            super().log(logs, start_time)
            return
        folder, step = Path(self.args.output_dir) / "completions", f"{self.state.global_step:05d}"
        table, kept = folder / f"completions_{step}.parquet", folder / f"completions_{step}.kept"
        if table.exists():
            table.replace(kept)
        super().log(logs, start_time)
        table.replace(folder / f"{self._evaluation}_{step}.parquet")
        if kept.exists():
            kept.replace(table)
