"""Publishing on the Hub: pipelines, models and Spaces."""

from ..lazy import lazy_names

__all__ = lazy_names(
    __name__,
    {".folder": "export", ".repository": "open_repository push upload", ".space": "export_space push_space"},
)
