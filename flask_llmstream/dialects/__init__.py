"""L1: JSON of the protocols that clients speak, to and from messages. Pure."""
