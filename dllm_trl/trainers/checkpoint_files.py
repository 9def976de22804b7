"""What a checkpoint folder must hold, judged before anything of it is loaded."""

import json
import re
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)


# Written after all other files but `trainer_state.json`, which is the last of each checkpoint
RUN_STATE_NAME = "run_state.json"
WHOLE_MODEL = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
# Adapters beside the first have folders of their own
ADAPTER = tuple(f"{place}{name}" for name in (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME) for place in ("", "*/"))
STATE_FILES = [(OPTIMIZER_NAME,), (SCHEDULER_NAME,), ("rng_state*.pth",)]
# Accelerate's layouts: a file, or a folder of shards
FSDP_FILES = [("pytorch_model_fsdp*", *WHOLE_MODEL), ("optimizer.bin", "optimizer_*"), *STATE_FILES[1:]]
# DeepSpeed keeps optimizer and scheduler in the folder that `latest` names
DEEPSPEED_FILES = [("latest",), ("*/*_states.pt",), STATE_FILES[2]]

_ZIPPED = (".pt", ".pth", ".bin")
_LOADED = (".safetensors", ".distcp", ".index.json", *_ZIPPED)
_SPARED = ("training_args.bin",)
_SMALL = 1 << 24  # bytes of a file that is read to its end


def list_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Step -> folder, of what a trainer left in `output_dir`."""
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return found


def list_files(folder: str | Path) -> dict[str, int]:
    """Name -> bytes, of the files in a checkpoint that resuming reads."""
    folder = Path(folder)
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in _SPARED]
    loaded = [
        file for file in files if file.name.endswith(_LOADED) or file.name in ("config.json", "latest", ".metadata")
    ]
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(loaded)}


def read_json(file: Path) -> dict | None:
    """What a file holds, `None` if that is not a whole JSON object."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):  # not there, cut off, or no text
        return None
    return content if isinstance(content, dict) else None


def _is_whole(file: Path) -> bool:
    """Whether a file's own structure says that it is complete. Data inside of large files is not read."""
    if file.suffix == ".json":
        return read_json(file) is not None
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return True
        except SafetensorError:
            return False
    if file.suffix in _ZIPPED:
        try:
            with zipfile.ZipFile(file) as archive:
                return file.stat().st_size > _SMALL or archive.testzip() is None
        except zipfile.BadZipFile:
            return False
    return file.stat().st_size > 0


def find_faults(folder: str | Path, required: Iterable[tuple[str, ...]], spared: str = "") -> list[str]:
    """
    What is wrong with a checkpoint, file by file; empty if it is whole.

    Args:
        folder (`str` or `Path`):
            The checkpoint.
        required (`Iterable[tuple[str, ...]]`):
            For each kind of file its possible names or patterns. One of them must be there.
        spared (`str`, *optional*):
            Pattern of files that may be missing although the checkpoint had them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"`{folder}` is no folder"]
    state = read_json(folder / TRAINER_STATE_NAME)
    if state is None or not isinstance(state.get("global_step"), int):
        return [f"`{TRAINER_STATE_NAME}` is missing or cut off"]
    faults = []
    sizes = (read_json(folder / RUN_STATE_NAME) or {}).get("files", {})
    names = dict.fromkeys(sizes)
    for patterns in required:
        found = [file.relative_to(folder).as_posix() for pattern in patterns for file in sorted(folder.glob(pattern))]
        if not found and not any(fnmatch(name, pattern) for name in sizes for pattern in patterns):
            faults.append(f"`{patterns[0]}` is missing")
        names |= dict.fromkeys(found)
    for index in [name for name in names if name.endswith(".index.json")]:
        names |= dict.fromkeys((read_json(folder / index) or {}).get("weight_map", {}).values())
    for name in names:
        file = folder / name
        if file.is_dir():
            continue
        if not file.is_file():
            if not fnmatch(name, spared):
                faults.append(f"`{name}` is missing")
        elif file.stat().st_size != sizes.get(name, file.stat().st_size):
            faults.append(f"`{name}` is cut off: it has {file.stat().st_size} bytes of {sizes[name]}")
        elif not _is_whole(file):
            faults.append(f"`{name}` is cut off or damaged")
    return faults
