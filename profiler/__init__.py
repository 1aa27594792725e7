"""What a Mixture-of-Experts model does: which experts each token picks, and which of them work together.

This package never imports `placement`: what a model did does not depend on what is done about it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profiler.errors import CoterieError
    from profiler.merging import merge
    from profiler.profile import Profile
    from profiler.recorder import Recorder
    from profiler.spec import MoESpec
    from profiler.trace import TokenTrace
    from profiler.writer import ProfileWriter

__all__ = ["CoterieError", "MoESpec", "Profile", "ProfileWriter", "Recorder", "TokenTrace", "merge"]

_HOMES = {
    "CoterieError": "errors",
    "MoESpec": "spec",
    "Profile": "profile",
    "ProfileWriter": "writer",
    "Recorder": "recorder",
    "TokenTrace": "trace",
    "merge": "merging",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `coterie --help` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'profiler' has no attribute {name!r}")
    return getattr(importlib.import_module(f"profiler.{_HOMES[name]}"), name)
