"""Training: one optimizer step with every memory setting, and the loop around it."""

from kit.front_door import hand_on

__getattr__, __all__ = hand_on(
    __name__,
    {  # file -> names
        "step": ["TrainingStep"],
        "savings": ["Savings"],
        "loop": ["TrainingPlan", "train"],
    },
)
