"""Every dialect through the clients that people use: what goes in is what they read."""
