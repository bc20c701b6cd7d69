"""GRPO in two verbs: roll out, update."""

from kit.front_door import hand_on

__getattr__, __all__ = hand_on(
    __name__,
    {  # file -> names
        "settings": ["Settings"],
        "rewards": ["correctness", "load_rewards"],
        "grpo": ["Policy", "rollout", "update"],
        "loop": ["train"],
    },
)
