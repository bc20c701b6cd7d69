"""Decide whether two trees (kit/grade/trees.py) are the same answer."""

from kit.front_door import hand_on

__getattr__, __all__ = hand_on(
    __name__,
    {  # file -> names
        "identities": ["same_function", "same_number"],
        "judge": ["Judge"],
        "scalars": ["Options"],
        "sympy_workers": ["prove", "start_worker"],
        "values": ["Evaluator"],
    },
)
