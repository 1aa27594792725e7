"""The embedded model and its texts: small enough to ship, trained long enough that its routing was learned.
Knows no routing.
"""

from pathlib import Path

NAME = "coterie-zoo"
"""What the embedded model is called."""

NUM_EXPERTS = 64
"""E of the embedded model, known without loading it."""

MODEL = Path(__file__).parent / "model"
"""Folder of the embedded model."""

CALIBRATION = Path(__file__).parent / "text" / "calibration"
"""Text to plan with, one file a domain; the model was not trained on it."""

HELD_OUT = Path(__file__).parent / "text" / "held_out"
"""Text that the model was neither trained on nor planned with; one file a domain, as in `CALIBRATION`."""
