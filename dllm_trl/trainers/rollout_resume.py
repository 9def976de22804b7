"""What RL keeps in a checkpoint beside TRL's: the rollout buffer and the reference model."""

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import TrainingArguments
from trl.trainer.utils import RepeatSampler

from .._compat import writable_parameters
from .exact_resume import ExactResumeMixin


logger = get_logger(__name__)

_REFERENCE_NAME = "reference_model.pt"
_ENTROPY_NAME = "entropy_ctrl_state.json"  # TRL writes it, after `trainer_state.json`
# Fields of the trainer's config beside TRL's own that a rollout, its rewards and its log-probabilities depend on ...
_SHARED_FIELDS = ("seed", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16")
# ... and those of TRL's and ours that change speed, memory, logs or the loss alone.
_OTHER_FIELDS = {"num_slots", "rounds_per_forward", "on_policy_check", "ds3_gather_for_generation"}
_OTHER_FIELDS |= {
    "num_generations_eval",
    "log_completions",
    "log_multimodal",
    "log_unique_prompts",
    "log_completions_hub_repo",
}
_OTHER_FIELDS |= {"num_completions_to_print", "epsilon", "epsilon_high", "delta", "ref_model_sync_steps"}
_OTHER_FIELDS |= {"ref_model_mixup_alpha", "importance_sampling_level"}
_OTHER_FIELDS |= {"value_learning_rate", "value_lr_scheduler_type", "value_lr_warmup_steps", "value_clip"}
_OTHER_FIELDS |= {"value_loss_norm", "value_epochs", "value_update_every", "value_warmup_updates"}


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


def _describe(value) -> str:
    """A value of a setting in words that are the same in the next process."""
    if isinstance(value, type) or callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value) if dataclasses.is_dataclass(value) else f"{type(value).__module__}.{type(value).__qualname__}"


def _digest(rows: list[dict]) -> int:
    return zlib.crc32(json.dumps([row.get("prompt") for row in rows], default=_describe).encode())


class RolloutResumeMixin(ExactResumeMixin):
    """
    For a [`~trl.GRPOTrainer`]: prompts come in an order that a resumed run finds again, each process keeps its rollout
    buffer in the checkpoint, and so does a reference model that moves. Mixed in before the trainer's class.
    """

    _may_lack = "rollout_state_*.pt"
    _buffer_prompts = None  # digest of the prompts that the buffer answers

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

    def train(self, *args, **kwargs):
        # What an earlier call left in the buffer is not this run's
        self._step, self._buffered_inputs = 0, None
        return super().train(*args, **kwargs)

    def _required_files(self) -> list[tuple[str, ...]]:
        extra = {_REFERENCE_NAME: self.args.sync_ref_model, _ENTROPY_NAME: self.args.use_adaptive_entropy}
        return [*super()._required_files(), *((name,) for name, needed in extra.items() if needed)]

    # --------------------------------------------------------------------------------------------------------- buffer

    @property
    def _in_buffer(self) -> bool:
        """Whether the next training step takes what an earlier one has decoded."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) != 0

    def _prepare_inputs(self, generation_batch):
        if self.model.training:
            digest = _digest(generation_batch)
            if self._in_buffer and self._buffered_inputs is not None and digest != self._buffer_prompts:
                logger.warning(
                    "The rollout buffer in the checkpoint answers other prompts than `train_dataset` has now: the "
                    "current batch is decoded again."
                )
                self._buffered_inputs = None
            self._buffer_prompts = digest
        return super()._prepare_inputs(generation_batch)

    def _rollout_state_file(self, folder: str) -> Path:
        return Path(folder) / f"rollout_state_{self.accelerator.process_index}.pt"

    def _save_rng_state(self, output_dir: str) -> None:
        # TRL forgets its buffer: a run that is resumed in the middle of one would decode again, with other weights
        state = {"step": self._step, "settings": self._rollout_settings()}
        if self._in_buffer:
            state |= {
                "buffered_inputs": self._buffered_inputs,
                "prompts": self._buffer_prompts,
            }
        os.makedirs(output_dir, exist_ok=True)
        torch.save(state, self._rollout_state_file(output_dir))
        super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        file = self._rollout_state_file(checkpoint)
        if not file.exists():
            if self._in_buffer:
                logger.warning(
                    f"{checkpoint} holds no rollout buffer (`{file.name}`): the current batch is decoded again."
                )
            return
        state = torch.load(file, map_location=self.accelerator.device, weights_only=True)
        if "buffered_inputs" not in state and not self._in_buffer:
            return
        made, now = state.get("settings", {}), self._rollout_settings()
        changes = [f"{name}: {made.get(name)} -> {value}" for name, value in now.items() if made.get(name) != value]
        if changes or "buffered_inputs" not in state:
            logger.warning(
                f"The rollout buffer in {checkpoint} was made with other settings than this run's, so the current "
                f"batch is decoded again: {'; '.join(changes)}."
            )
            return
        self._step = state["step"]
        self._buffered_inputs, self._buffer_prompts = state["buffered_inputs"], state["prompts"]

    def _rollout_settings(self) -> dict[str, str]:
        """What made the buffer, beside the weights and the prompts: name -> value, as JSON."""
        names = {field.name for field in dataclasses.fields(self.args)}
        names -= {field.name for field in dataclasses.fields(TrainingArguments)} | _OTHER_FIELDS
        names = {name for name in names if not name.startswith("vllm_")}
        settings = {name: getattr(self.args, name) for name in sorted(names.union(_SHARED_FIELDS))}
        settings |= {
            k: v for k, v in self.generation_config.to_dict().items() if k not in ("seed", "transformers_version")
        }
        settings |= {
            "num_processes": self.accelerator.num_processes,
            "grid": self.grid,
            "objective": self.objective,
            "reward_funcs": self.reward_func_names,
            "reward_weights": self.reward_weights.tolist(),
        }
        return {name: json.dumps(value, sort_keys=True, default=_describe) for name, value in settings.items()}

    # ------------------------------------------------------------------------------------------------ reference model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.sync_ref_model:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            with self._dist.gather_params(list(self.ref_model.parameters())):
                state = get_model_state_dict(self.ref_model, options=options)
            if self.args.should_save:
                torch.save(state, Path(output_dir) / _REFERENCE_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.args.sync_ref_model and checkpoint is not None:
            state = torch.load(Path(checkpoint) / _REFERENCE_NAME, map_location="cpu", weights_only=True)
            with writable_parameters(self.ref_model, self._dist.is_zero3):
                set_model_state_dict(self.ref_model, state, options=StateDictOptions(full_state_dict=True))
