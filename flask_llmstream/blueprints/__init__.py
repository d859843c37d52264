"""L5: the routes of each dialect."""
