"""Routing that was recorded elsewhere, one source a file."""
