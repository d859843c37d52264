"""Every fault that we know of, on real servers: what the client sees, and what is left."""
