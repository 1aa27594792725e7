"""Routing that was recorded elsewhere, one source a file. Runs no engine and no model."""
