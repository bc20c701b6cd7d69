"""Reports: one self-contained HTML page per run."""

from kit.front_door import hand_on

__getattr__, __all__ = hand_on(__name__, {"before_after": ["write_report"]})
