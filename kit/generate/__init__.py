"""The batched sampler."""

from kit.front_door import hand_on

__getattr__, __all__ = hand_on(
    __name__,
    {  # file -> names
        "sampling": ["SamplingParams", "sample"],
        "sampler": ["Completion", "generate"],
        "kv_cache": ["cache_bytes"],
        "server": ["Server", "connect"],
    },
)
