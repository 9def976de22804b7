import pytest
import torch


@pytest.fixture
def uncompiled():
    """transformers compiles FlexAttention, which PyTorch's CPU backend cannot do for every mask. Run it as written."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
