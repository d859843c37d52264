"""L1: values, deadlines, the runtime and the channel. Nothing here knows Flask."""
