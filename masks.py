"""Which cache slots the tokens of a block see: causal masks, sliding windows, and the form that attention takes.

    mask = causal_mask(input_pos, n_slot)                       # [B, T, S] bool
    bias = attention_bias(mask, group, dtype)                   # [B, 1, G*T, S], once a pass
    bias = hide_outside(bias, slot_positions(input_pos, cache_pos, n_all, n_slot), input_pos, window)

Shapes: B batch, T new tokens, S cache slots read, G query heads of a key/value head.
"""
import torch
from torch import Tensor


def causal_mask(input_pos: Tensor, n_slot: int | None, window: int | None = None) -> Tensor:
    """[B, T] positions -> [B, T, S] bool: the slots up to each position. Without a cache S is T, the block itself.

    With a window, only the last so many of them.
    """
    slots = input_pos[:, None, :] if n_slot is None else torch.arange(n_slot, device=input_pos.device)
    mask = slots <= input_pos[:, :, None]
    return mask if window is None else mask & ~outside(slots, input_pos, window)


def outside(slot_pos: Tensor, input_pos: Tensor, window: int) -> Tensor:
    """Whether slots with these positions [B, 1, S] or [S] are too far back for tokens [B, T]: [B, T, S] bool."""
    return slot_pos <= input_pos[:, :, None] - window


def slot_positions(input_pos: Tensor, cache_pos: Tensor | None, n_all: int, n_slot: int) -> Tensor:
    """[B, n_slot], the position of the token in each of the first of n_all slots, for a block of new ones [B, T].

    Slots of the block hold its positions: nodes of a tree stand side by side. In all others slot and position agree.
    """
    if cache_pos is None:
        return input_pos
    slots = torch.arange(n_all, device=input_pos.device).expand(len(input_pos), -1)
    return slots.scatter(1, cache_pos, input_pos)[:, :n_slot]


def hide_outside(bias: Tensor, slot_pos: Tensor, input_pos: Tensor, window: int) -> Tensor:
    """bias [B, 1, G*T, S] without the slots [B, S] that lie outside of a sliding window."""
    # A finished row may be past the slots that are read. It sees the last of them: no row may see none.
    at = input_pos.minimum(slot_pos.amax(-1, keepdim=True))
    hidden = outside(slot_pos[:, None], at, window)
    return bias.masked_fill(hidden.repeat(1, bias.shape[2] // input_pos.shape[1], 1)[:, None], -torch.inf)


def bucket(length: int, n_slot: int) -> int:
    """Cache slots that attention reads for `length` used ones: 128, 192, 256, 384, 512, 768, ... up to n_slot.

    The sizes are few, so that each can have a captured graph, and close, so that attention reads little in vain.
    """
    size = 128
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return min(size, n_slot)


def attention_bias(mask: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """bool [B, T, S] -> additive [B, 1, G*T, S], the same for the G query heads of a key/value group. Made once a pass.

    A mask of floating-point numbers is such a bias already.
    """
    if mask.is_floating_point():
        return mask
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return bias.repeat(1, group, 1)[:, None]
