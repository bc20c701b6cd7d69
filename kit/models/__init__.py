"""Models: load one, run its backbone over a pack, reach its head."""

from kit.front_door import hand_on

__getattr__, __all__ = hand_on(
    __name__,
    {  # file -> names
        "load_any": ["load", "load_to_train"],
        "backbone": ["head_weight", "hidden_states"],
    },
)
