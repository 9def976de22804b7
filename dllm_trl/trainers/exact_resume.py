"""What makes a killed run end with the weights of one that was not, for SFT and for RL."""

import json
import time
from pathlib import Path

import numpy as np
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from torch import nn
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME

from .checkpoint_files import (
    ADAPTER,
    DEEPSPEED_FILES,
    FSDP_FILES,
    RUN_STATE_NAME,
    STATE_FILES,
    WHOLE_MODEL,
    find_faults,
    list_checkpoints,
    list_files,
    read_json,
)


logger = get_logger(__name__)


class ExactResumeMixin:
    """
    For a [`~transformers.Trainer`]: a checkpoint is whole or known not to be, it is judged before anything of it is
    loaded, and what a training step draws is a function of the step. Mixed in before the trainer's class.
    """

    _micro_step = 0  # forward and backward passes since the last optimizer step
    _may_lack = ""  # pattern of files without which a run goes on, with a word about it

    # ------------------------------------------------------------------------------------------------------- resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_whole_checkpoint()
        elif resume_from_checkpoint:
            faults = self._find_faults([resume_from_checkpoint])[0]
            if faults:
                raise ValueError(_refusal(resume_from_checkpoint, faults))
        elif self.args.save_strategy != "no" and (earlier := list_checkpoints(self.args.output_dir)):
            names = ", ".join(earlier[step].name for step in sorted(earlier))
            logger.warning(
                f"`output_dir` {self.args.output_dir} holds checkpoints of an earlier run ({names}), and this run "
                "writes its own among them. To go on with the earlier run, call "
                "`train(resume_from_checkpoint=True)`; to keep the two apart, choose another `output_dir`."
            )
        if resume_from_checkpoint:
            self._take_up(resume_from_checkpoint)
        set_seed(self.args.seed)  # the order of the data begins with it, whatever was drawn since construction
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.state.global_step == 0 and self.args.num_train_epochs > 0:
            raise ValueError(
                "Not one step was taken: `train_dataset` does not fill a single batch. Give it more rows, or lower "
                "`per_device_train_batch_size` (RL: `generation_batch_size`, SFT: also `dataloader_drop_last=False`)."
            )
        if resume_from_checkpoint and self.state.global_step == self._initial_global_step:
            logger.warning(
                f"{resume_from_checkpoint} is at step {self.state.global_step}, and this run ends at step "
                f"{self.state.max_steps}: nothing is left to train. To go on, raise `num_train_epochs` or `max_steps`."
            )
        return output

    def _take_up(self, checkpoint: str) -> None:
        state = read_json(Path(checkpoint) / RUN_STATE_NAME)
        if state is None:
            logger.warning(
                f"{checkpoint} has no `{RUN_STATE_NAME}`, as checkpoints of other trainers: token counts start at 0."
            )
            return
        self._total_train_tokens = state["total_train_tokens"]
        if state["num_processes"] != self.accelerator.num_processes:
            logger.warning(
                f"{checkpoint} was written by {state['num_processes']} processes, this run has "
                f"{self.accelerator.num_processes}: dropout and what else a process draws will differ."
            )

    def _required_files(self) -> list[tuple[str, ...]]:
        """For each file that resuming reads its possible names, by the way this run is sharded."""
        if self.is_deepspeed_enabled:
            return DEEPSPEED_FILES
        if self.is_fsdp_enabled:
            return FSDP_FILES
        return [ADAPTER if is_peft_model(self.model) else WHOLE_MODEL, *STATE_FILES]

    def _find_faults(self, folders: list[str | Path]) -> list[list[str]]:
        """For each folder what is wrong with it, on any process, so that all of them decide alike."""
        faults = [find_faults(folder, self._required_files(), self._may_lack) for folder in folders]
        everywhere = gather_object([faults])
        return [list(dict.fromkeys(sum(per_process, []))) for per_process in zip(*everywhere, strict=True)]

    def _last_whole_checkpoint(self) -> str:
        """The checkpoint in `output_dir` that was written last, of those that are whole."""
        folders = list_checkpoints(self.args.output_dir)
        written = {
            step: (read_json(path / RUN_STATE_NAME) or {}).get("written", 0.0) for step, path in folders.items()
        }
        order = sorted(folders, key=lambda step: (written[step], step), reverse=True)
        faults = dict(zip(order, self._find_faults([folders[step] for step in order]), strict=True))
        for step in order:
            if faults[step]:
                logger.warning(
                    f"{folders[step]} is incomplete (was the run killed while writing it?) and is passed over: "
                    f"{'; '.join(faults[step])}."
                )
                continue
            later = [folders[other].name for other in sorted(order) if other > step and not faults[other]]
            if later:
                logger.warning(
                    f"{folders[step]} was written last and is resumed. {', '.join(later)} beside it: of an earlier "
                    "run, passed over. To resume from there, pass its path as `resume_from_checkpoint`."
                )
            return str(folders[step])
        found = "".join(f" {_refusal(folders[step], faults[step])}" for step in order)
        raise ValueError(f"No complete checkpoint found in `output_dir` {self.args.output_dir}.{found}")

    # --------------------------------------------------------------------------------------------------------- saving

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        # A folder that is written over is not complete until its last file is new
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        # Called on every process, after the weights and before `trainer_state.json`
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            state = {
                "written": time.time(),
                "num_processes": self.accelerator.num_processes,
                "total_train_tokens": self._total_train_tokens,
                "files": list_files(output_dir),
            }
            (Path(output_dir) / RUN_STATE_NAME).write_text(json.dumps(state, indent=2))

    # -------------------------------------------------------------------------------------------------------- drawing

    def _seed_generators(self, *place: int) -> None:
        """
        Dropout, noise and shuffles of what follows are functions of `seed` and a place in the run: evaluations,
        callbacks that decode and a resume leave them alone.
        """
        sequence = np.random.SeedSequence((self.args.seed, self.state.global_step, *place))
        set_seed(int(sequence.generate_state(1)[0]))

    def get_batch_samples(self, *args, **kwargs):
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], None  # a finished run, resumed: transformers would take one step more
        self._micro_step = 0
        self._seed_generators(0)
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        self._micro_step += 1
        self._seed_generators(self._micro_step, self.args.process_index)
        return super().training_step(*args, **kwargs)


def _refusal(folder: str | Path, faults: list[str]) -> str:
    return (
        f"{folder} is not a whole checkpoint: {'; '.join(faults)}. Resume from another one, or start a new run from "
        "its weights (`model=...`); `save_only_model=True` leaves out what resuming needs."
    )
