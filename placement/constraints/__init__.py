"""Routing that respects a placement: which experts a token may pick, and fine-tuning under it.
Knows no engine and no runtime.
"""
