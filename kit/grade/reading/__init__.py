"""Read an answer's text as a tree (kit/grade/trees.py)."""

from kit.front_door import hand_on

__getattr__, __all__ = hand_on(
    __name__,
    {  # file -> names
        "parser": ["Parser", "parse"],
        "tokens": ["DIGITS", "clean", "group_ends"],
    },
)
