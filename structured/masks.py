"""The masks of structured output on their way to the device.

A mask lies in the slot of its sequence, where allowed_token_ids have theirs too (`Slots.allowed`),
so a step reads it as it reads those, and no program is compiled for it but the one that writes.
"""

import dataclasses
from functools import partial

import jax
import numpy as np

from sampling import Slots
from sequence import Sequence

MASKS_AT_ONCE = 16
"""Masks that one call writes; more take several. Each is 16 KB with a vocabulary of 128k."""


@partial(jax.jit, donate_argnums=0)
def put_masks(slots: Slots, slot: jax.Array, masks: jax.Array) -> Slots:
    """Write masks (n, V / 32) uint32 to slots (n,) int32. `slots` is donated."""
    return dataclasses.replace(slots, allowed=slots.allowed.at[slot].set(masks))


def write_masks(slots: Slots, seqs: list[Sequence], padding_slot: int) -> Slots:
    """Return slots with the masks of those that have structured output. `slots` is donated, unless
    none has.

    padding_slot: the slot that no sequence has."""
    seqs = [seq for seq in seqs if seq.matcher is not None]
    for first in range(0, len(seqs), MASKS_AT_ONCE):
        slots = write_some(slots, seqs[first : first + MASKS_AT_ONCE], padding_slot)
    return slots


def write_some(slots: Slots, seqs: list[Sequence], padding_slot: int) -> Slots:
    """Do so for MASKS_AT_ONCE sequences or fewer; for none too, which compiles the program."""
    slot = np.full(MASKS_AT_ONCE, padding_slot, np.int32)
    masks = np.full((MASKS_AT_ONCE, slots.allowed.shape[1]), 0xFFFFFFFF, np.uint32)
    for i, seq in enumerate(seqs):
        assert seq.matcher is not None, f"{seq.key} has no structured output"
        mask = seq.matcher.mask[: masks.shape[1]]
        slot[i] = seq.occupied_slot
        masks[i] = 0  # a model may have more tokens than its tokenizer
        masks[i, : len(mask)] = mask
    return put_masks(slots, slot, masks)
