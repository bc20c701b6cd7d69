"""The grader: is this answer right? Correct, wrong or unknown, with the rule that decided."""

from kit.front_door import hand_on

__getattr__, __all__ = hand_on(__name__, {"verdict": ["Verdict", "grade"]})
