"""Measures of generated images."""

from .metrics import frechet_distance

__all__ = ["frechet_distance"]
