"""Models: load one, run its backbone over a pack, reach its head."""

import logging

from kit.front_door import hand_on

# On some CPUs, importing bitsandbytes warns that it did not download a compiled kernel from the hub. Nothing
# is missing: it uses the one that it brings.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__getattr__, __all__ = hand_on(
    __name__,
    {  # file -> names
        "load_any": ["load", "load_to_train"],
        "loading": ["load_without_weights"],
        "backbone": ["head_weight", "hidden_states"],
    },
)
