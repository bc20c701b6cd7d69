"""Simulate what a training step needs on a card, choose settings that fit, and measure what a card held."""

from kit.front_door import hand_on

__getattr__, __all__ = hand_on(
    __name__,
    {  # file -> names
        "simulate": ["Plan", "plan"],
        "measured": ["PeakMemory"],
    },
)
