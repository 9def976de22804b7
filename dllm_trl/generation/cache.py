"""Preallocated key/value storage: one slot per row in flight, written in place."""

from dataclasses import dataclass

import torch


@dataclass
class Prefix:
    """Keys and values of the full blocks of a prompt: per layer `(kv_heads, length, head_dim)`. With a shifted head
    also the logits `(V,)` of its last token, which predict the one after it."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    length: int
    logits: torch.Tensor | None = None


class SlotCache:
    r"""
    Keys and values of `slots` rows in flight, per layer `(slots, kv_heads, length, head_dim)`. A block's noisy keys
    are written where its committed ones will be: what is not committed yet lies beyond what later queries may see, and
    is overwritten by the next step, so nothing is ever rolled back.
    """

    def __init__(self, config, slots: int, length: int, dtype: torch.dtype, device: torch.device):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (slots, config.num_key_value_heads, length, head_dim)
        # Zeros, not empty: a masked key still takes part in 0 * value
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def load(self, slot: int, prefix: Prefix) -> None:
        """Starts a row: its prompt's keys and values go to the head of `slot`."""
        if prefix.length == 0:  # a prompt shorter than one block has nothing to cache
            return
        for cached, new in zip(self.keys + self.values, prefix.keys + prefix.values, strict=True):
            cached[slot, :, : prefix.length] = new

    def move(self, source: int, target: int, length: int) -> None:
        """Copies a row to another slot, which keeps the rows in flight contiguous."""
        for cached in self.keys + self.values:
            cached[target, :, :length] = cached[source, :, :length]


class SlotView:
    r"""
    What stock attention modules see of a [`SlotCache`] in one forward: `update` writes the new keys and values of `U`
    units of `W` tokens at their rows and positions, and returns those of the whole rows, `(U, kv_heads, length,
    head_dim)`.

    Args:
        cache ([`SlotCache`]):
            Where keys and values live.
        slots (`torch.LongTensor` of shape `(U,)`):
            Slot of each unit.
        positions (`torch.LongTensor` of shape `(U, W)`):
            Pad-free position of each token.
        length (`int`):
            Keys to return, counted from position 0.
    """

    def __init__(self, cache: SlotCache, slots: torch.Tensor, positions: torch.Tensor, length: int):
        self.cache, self.slots, self.positions, self.length = cache, slots, positions, length

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        stored_keys, stored_values = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        index = (self.slots[:, None], slice(None), self.positions)
        # (U, W, kv_heads, head_dim); under autocast keys may come in another type than attention will cast them to
        stored_keys[index] = keys.transpose(1, 2).to(stored_keys.dtype)
        stored_values[index] = values.transpose(1, 2).to(stored_values.dtype)
        return stored_keys[self.slots, :, : self.length], stored_values[self.slots, :, : self.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length
