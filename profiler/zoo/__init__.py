"""The embedded model and its texts: small enough to ship, trained long enough that its routing was learned.
Knows no routing.
"""

from pathlib import Path

NAME = "coterie-zoo"
NUM_EXPERTS = 64
MODEL = Path(__file__).parent / "model"
CALIBRATION = Path(__file__).parent / "text" / "calibration"
HELD_OUT = Path(__file__).parent / "text" / "held_out"
"""Text that the model was neither trained on nor planned with; one file a domain, as in `CALIBRATION`."""
