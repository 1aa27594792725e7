"""Routing that respects a placement: which experts a token may pick, and fine-tuning under it."""
