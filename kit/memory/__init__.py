"""The memory plan: what a training step needs on a card, simulated, and what a card really held."""

from kit.front_door import hand_on

__getattr__, __all__ = hand_on(
    __name__,
    {  # file -> names
        "simulate": ["Plan", "plan"],
        "measured": ["PeakMemory"],
    },
)
