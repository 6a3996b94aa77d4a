"""Publishing on the Hub: pipelines, models and Spaces."""

from .folder import export
from .repository import open_repository, push, upload
from .space import export_space, push_space

__all__ = ["export", "export_space", "open_repository", "push", "push_space", "upload"]
