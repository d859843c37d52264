"""L2: where answers and their events are kept for those who come back for them."""

from .memory import MemoryStore
from .owner import owner_of
from .responses import KeptResponse, ResponseStore, Turn

__all__ = ["KeptResponse", "MemoryStore", "ResponseStore", "Turn", "owner_of"]
