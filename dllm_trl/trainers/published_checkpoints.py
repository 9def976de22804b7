"""Checkpoints hold weights under their published names, which transformers' `Trainer` does not translate."""

from pathlib import Path

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


logger = get_logger(__name__)


class PublishedCheckpointMixin:
    """
    For a [`~transformers.Trainer`]: a model is loaded from its checkpoint as `from_pretrained` loads it. The stock way
    hands the file's names to `load_state_dict`, which passes over every name it does not know: a resumed LLaDA or
    mixture of experts would go on with the weights it was made with. Mixed in before the trainer's class.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_published(resume_from_checkpoint, self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_published(self.state.best_model_checkpoint, self.model):
            super()._load_best_model()

    def _load_published(self, folder: str, model: nn.Module) -> bool:
        """Whether `folder` holds a whole model in published form, which then is loaded into `model`."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or is_peft_model(model):
            return False  # these keep the names they have in memory
        if not any((Path(folder) / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
            return False
        saved, info = type(model).from_pretrained(folder, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"The checkpoint `{folder}` lacks weights of the model: {sorted(info['missing_keys'])}.")
        model.load_state_dict(saved.state_dict())
        return True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.grid.attention == "block" and self.grid.block_length != self.model.config.block_size:
            length = self.grid.block_length
            logger.warning_once(
                f"The model was trained with `block_length={length}`, but its config keeps "
                f"`block_size={self.model.config.block_size}`. Decode with `block_length={length}`, or set "
                "`model.config.block_size` before saving."
            )
        super().save_model(output_dir, _internal_call=_internal_call)
