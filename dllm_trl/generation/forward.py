"""
The forward of decoding, over units: `W` consecutive tokens of a row (a block, or as much as full attention computes
anew), whose queries all see the same keys of that row. [`StockForward`] runs the model's own modules and works for
every family, LoRA, quantisation and hooks; [`FusedForward`](fused_forward.py) is the fast one for plain llama-like
decoders. `make_forward` picks.
"""

from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache

from .._compat import offloaded_to
from .cache import Prefix, SlotCache, SlotView
from .fused_forward import FusedForward


class Span(NamedTuple):
    """Units `first .. last - 1`: they see `length` keys at most, not all of them the same number where `ragged`, and
    lie in slots `slot, slot + 1, ...`, or anywhere (`None`)."""

    first: int
    last: int
    length: int
    ragged: bool
    slot: int | None


@dataclass
class Units:
    r"""
    One decode forward: first the units whose logits may be read, then the finished blocks to be committed.

    Args:
        ids (`torch.LongTensor` of shape `(U, W)`):
            Tokens.
        positions (`torch.LongTensor` of shape `(U, W)`):
            Pad-free positions.
        slots (`torch.LongTensor` of shape `(U,)`):
            Row of the cache.
        visible (`torch.LongTensor` of shape `(U,)`):
            Keys `[0, visible)` of the row are seen.
        rows (`int`):
            Units whose logits may be read, `A`.
        length (`int`):
            Largest `visible`.
        read (`torch.LongTensor` of shape `(n,)`):
            Which of the first `A * W` tokens (or of `carried`) need logits.
        spans (`list[Span]`):
            The units in order, cut into pieces. No span holds units of both kinds.
        carried (`torch.LongTensor` of shape `(U, C)`, *optional*):
            The tokens, among all `U * W`, that `read` chooses from, `C` of every unit, where these are not all.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    visible: torch.Tensor
    rows: int
    length: int
    read: torch.Tensor
    spans: list[Span]
    carried: torch.Tensor | None = None


class StockForward:
    """Decoding with the model's own modules: the reference, and the path for models that were wrapped or changed."""

    def __init__(self, model: nn.Module):
        self.model = model

    def reserve(self, length: int) -> None:
        """Nothing to prepare for positions below `length`: the modules make their own tables."""

    def prefill(self, prompts: list[torch.Tensor], block_length: int) -> list[Prefix]:
        """Keys and values of whole-block prompts, one after another."""
        prefixes = []
        for ids in prompts:
            if len(ids) == 0:
                prefixes.append(Prefix([], [], 0))
                continue
            cache = DynamicCache(config=self.model.config)
            hidden = self.model.base_model(
                input_ids=ids[None], past_key_values=cache, use_cache=True, block_length=block_length
            ).last_hidden_state
            layers = cache.layers
            prefixes.append(Prefix([x.keys[0] for x in layers], [x.values[0] for x in layers], len(ids)))
            if self.model.config.logit_shift:
                prefixes[-1].logits = self.model.get_output_embeddings()(hidden[0, -1:])[0]
        return prefixes

    def step(self, units: Units, cache: SlotCache | None) -> torch.Tensor:
        """Logits `(n, V)` of the tokens in `units.read`. Without a cache, units are whole rows."""
        view = None if cache is None else SlotView(cache, units.slots, units.positions, units.length)
        keys = torch.arange(units.length, device=units.ids.device)
        mask = (keys < units.visible[:, None])[:, None, None]  # (U, 1, 1, K)
        hidden = self.model.base_model(
            input_ids=units.ids,
            position_ids=units.positions,
            attention_mask=mask.expand(-1, 1, units.ids.size(1), -1),
            past_key_values=view,
            use_cache=cache is not None,
        ).last_hidden_state
        read = units.read if units.carried is None else units.carried.view(-1)[units.read]
        return self.model.get_output_embeddings()(hidden.flatten(0, 1)[read])


# The packed weights of small models are kept between calls: packing costs as much as a handful of steps.
REUSED_PARAMETERS = 2**26
_READY: WeakKeyDictionary[nn.Module, tuple[list, FusedForward]] = WeakKeyDictionary()


def _fingerprint(model: nn.Module) -> list:
    """Changes with the weights, however they are changed: the version counters miss what goes through `.data`, a hash
    of the bits misses a change of sign, a sum misses an exchange."""
    marks = []
    for parameter in model.parameters():
        weights = parameter.detach().flatten(0, -2) if parameter.dim() > 1 else parameter.detach()[None]
        sums = weights @ _ramp(weights)
        marks += [
            parameter.data_ptr(),
            parameter._version,
            torch.hash_tensor(weights).item(),
            (sums @ _ramp(sums)).item(),
        ]
    return marks


def _ramp(weights: torch.Tensor) -> torch.Tensor:
    return torch.linspace(1, 2, weights.size(-1), dtype=weights.dtype, device=weights.device)


def execution_device(model: nn.Module) -> torch.device:
    """Where the model computes. Under accelerate's offloading its weights are elsewhere between forwards."""
    embeddings = model.get_input_embeddings()
    device = offloaded_to(embeddings)
    return embeddings.weight.device if device is None else device


def make_forward(model: nn.Module, fused: bool | None = None) -> "StockForward | FusedForward":
    """The fastest forward that computes what `model` computes; `fused` forces one of the two."""
    # Autocast picks a type for each operation of the modules: only they compute what the trainer computes under it
    autocast = torch.is_autocast_enabled(execution_device(model).type)
    supported = FusedForward.supports(model) and not autocast
    if fused and not supported:
        raise ValueError(
            f"The fused decode forward does not cover {type(model).__name__} as it is; leave `fused` unset."
        )
    if not (supported if fused is None else fused):
        return StockForward(model)
    if model.num_parameters() > REUSED_PARAMETERS or not hasattr(torch, "hash_tensor"):
        return FusedForward(model)
    marks = _fingerprint(model)
    if model not in _READY or _READY[model][0] != marks:
        _READY[model] = marks, FusedForward(model)
    return _READY[model][1]
