"""The scheduler folder's conversions, under a name the pipelines can import as a sibling.

A published pipeline folder carries `schedulers/gaussian.py` itself in this file's place.
"""

from ..schedulers.gaussian import clip_x0_, convert, from_x0, to_x0

__all__ = ["clip_x0_", "convert", "from_x0", "to_x0"]
