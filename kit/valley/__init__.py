"""The experiment: models x training sets x sizes x seeds, run, read and explained."""

from kit.front_door import hand_on

__getattr__, __all__ = hand_on(__name__, {"study": ["Study"]})
