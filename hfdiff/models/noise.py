"""The scheduler folder's noise levels, under a name the models can import as a sibling.

A published model folder carries `schedulers/noise.py` itself in this file's place.
"""

from ..schedulers.noise import geometric_sigmas

__all__ = ["geometric_sigmas"]
