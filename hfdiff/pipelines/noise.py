"""The scheduler folder's noise levels, under a name the pipelines can import as a sibling.

A published pipeline folder carries `schedulers/noise.py` itself in this file's place.
"""

from ..schedulers.noise import solve_step_size

__all__ = ["solve_step_size"]
