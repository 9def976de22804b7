"""What makes a killed run end with the weights of one that was not, also in the middle of a rollout buffer."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import RepeatSampler


logger = get_logger(__name__)


class _EpochSampler(RepeatSampler):
    """[`~trl.trainer.utils.RepeatSampler`] whose order is a function of the epoch, so that a resumed run finds it
    again."""

    def __init__(self, *args, epoch: Callable[[], int], **kwargs):
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


class ExactResumeMixin:
    """
    For a [`~trl.GRPOTrainer`]: prompts come in an order that a resumed run finds again, and each process keeps its
    rollout buffer in the checkpoint. Mixed in before the trainer's class.
    """

    def _get_train_sampler(self, dataset: Dataset | None = None) -> RepeatSampler:
        sampler = super()._get_train_sampler(dataset)
        return _EpochSampler(
            sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete_checkpoint()
        # What an earlier call left in the buffer is not this run's
        self._step, self._buffered_inputs, self._policy_step = 0, None, None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _last_complete_checkpoint(self) -> str:
        """The newest checkpoint that was written to its end: `trainer_state.json` is the last file of each."""
        folders = Path(self.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        steps = {int(number): path for path in folders if (number := path.name.rsplit("-", 1)[1]).isdigit()}
        for folder in (steps[step] for step in sorted(steps, reverse=True)):
            try:
                json.loads((folder / "trainer_state.json").read_text())
                return str(folder)
            except (FileNotFoundError, json.JSONDecodeError):
                logger.warning(f"{folder} is incomplete (was the run killed while writing it?) and is passed over.")
        raise ValueError(f"No complete checkpoint found in `output_dir` {self.args.output_dir}.")

    def _rollout_state_file(self, folder: str) -> Path:
        return Path(folder) / f"rollout_state_{self.accelerator.process_index}.pt"

    def _save_rng_state(self, output_dir: str) -> None:
        # Called on every process, after the weights and before `trainer_state.json`. TRL forgets its buffer: a run
        # that is resumed in the middle of one would decode again, with other weights.
        super()._save_rng_state(output_dir)
        state = {
            "step": self._step,
            "policy_step": self._policy_step,
            "buffered_inputs": self._buffered_inputs,
            "layout": self._rollout_layout(),
        }
        file = self._rollout_state_file(output_dir)
        torch.save(state, f"{file}.tmp")
        os.replace(f"{file}.tmp", file)
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        file = self._rollout_state_file(checkpoint)
        if not file.exists():
            logger.warning(
                f"{checkpoint} holds no rollout buffer (`{file.name}`): the current batch is decoded again."
            )
            return
        state = torch.load(file, map_location=self.accelerator.device, weights_only=True)
        if state["layout"] != self._rollout_layout():
            logger.warning(
                f"The rollout buffer in {checkpoint} was made with {state['layout']}, this run has "
                f"{self._rollout_layout()}: the current batch is decoded again."
            )
            return
        self._step, self._policy_step = state["step"], state["policy_step"]
        self._buffered_inputs = state["buffered_inputs"]

    def _rollout_layout(self) -> dict[str, int]:
        return {
            "num_processes": self.accelerator.num_processes,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "steps_per_generation": self.args.steps_per_generation,
            "num_iterations": self.num_iterations,
        }
