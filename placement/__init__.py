"""What to do about a profile: place the experts, say how good the plan is, run it, show it.
Only `cli` sees all of it.
"""
