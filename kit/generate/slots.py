"""How many responses are sampled at once: what is asked for, or as many as the card's memory holds."""

from __future__ import annotations

import torch

from kit.generate.kv_cache import cache_bytes
from kit.machine import GIB, return_memory
from kit.progress import print_line

MOST_SLOTS = 256  # that are chosen here; a plan for a card, which counts everything, goes further
CPU_SLOTS = 16  # on a CPU, where a step takes longer by the row
USUAL_SLOTS = 64  # planned for if no number is asked for: most cards hold them, of models around 1B
SHARE = 0.8  # of a card's free memory may hold the cache: a step's tensors need some, too
ASKED_SHARE = 0.95  # if a number is asked for, such as a plan's, which has counted the step


def choose_slots(model, num_slots: int, num_prompts: int, positions: int) -> int:
    """Return how many prompts to answer at once, at least 1. Print it unless it is the number asked for.

    num_slots: asked for; 0 = as many as memory holds. positions: of the longest prompt and its response.
    """
    device = model.get_input_embeddings().weight.device
    if not is_card(device):
        slots = min(num_slots or CPU_SLOTS, num_prompts)
        if not num_slots:
            print_line(f"slots       {slots} answers at once")
        return slots

    return_memory(device)
    free, slot_bytes = torch.cuda.mem_get_info(device)[0], cache_bytes(model, 1, positions)
    wanted = min(num_slots or MOST_SLOTS, num_prompts)
    slots = slots_that_fit((ASKED_SHARE if num_slots else SHARE) * free, slot_bytes, wanted)
    if not num_slots or slots < wanted:
        instead = f" instead of {wanted}" if num_slots else ""
        cache = f"{slots * slot_bytes / GIB:.2f} of {free / GIB:.2f} GiB that are free"
        print_line(f"slots       {slots} answers at once{instead}, whose cache takes {cache}")
    return slots


def is_card(device: torch.device) -> bool:
    return device.type == "cuda"


def slots_that_fit(num_bytes: float, slot_bytes: int, wanted: int) -> int:
    """Return how many slots of slot_bytes fit into num_bytes: at most `wanted`, and at least one."""
    return max(1, min(wanted, int(num_bytes) // slot_bytes))
