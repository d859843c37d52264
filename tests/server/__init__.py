"""Real servers in processes of their own, spoken to through raw sockets."""
