"""L3: what generates tokens."""
