"""L2: engines, their queue, their workers."""
