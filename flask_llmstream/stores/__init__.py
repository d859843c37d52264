"""L2: where the frames of answers are kept for those who come back for them."""

from .memory import MemoryStore
from .owner import owner_of

__all__ = ["MemoryStore", "owner_of"]
