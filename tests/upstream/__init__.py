"""Backends behind HTTP: a scripted upstream for faults, a real one that nobody here wrote."""
