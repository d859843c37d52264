"""What this package costs, against the least possible and against its peers."""
