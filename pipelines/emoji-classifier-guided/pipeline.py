"""Opens this folder with diffusers, where hfdiff is installed: `trust_remote_code=True`."""

from hfdiff import ClassifierGuidedPipeline

__all__ = ["ClassifierGuidedPipeline"]
