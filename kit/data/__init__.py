"""Problems, traces and documents: from a file or the hub to token ids."""

from kit.front_door import hand_on

__getattr__, __all__ = hand_on(
    __name__,
    {  # file -> names
        "documents": ["load_documents", "make_documents"],
        "rows": ["read_rows"],
        "chat": ["ChatFormat"],
        "responses": ["Trace", "pick_response"],
        "traces": ["read_traces"],
        "problems": ["Question"],
    },
)
