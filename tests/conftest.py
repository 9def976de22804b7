"""Where the numbers of the public implementations lie. Point the variables at other copies to test against those."""

import os
from pathlib import Path

import pytest


FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Tiny checkpoints in the published formats, with what the public code computes on them."""
    return Path(os.environ.get("DLLM_TRL_GOLDEN", FIXTURES / "golden"))


@pytest.fixture(scope="session")
def oracles_dir() -> Path:
    """Inputs and expected outputs of every objective."""
    return Path(os.environ.get("DLLM_TRL_ORACLES", FIXTURES / "oracles"))


@pytest.fixture(scope="session")
def tokenizers_dir() -> Path:
    """Published tokenizer folders; the ones in the repository lack the large vocabulary files."""
    return Path(os.environ.get("DLLM_TRL_TOKENIZERS", FIXTURES / "tokenizers"))
