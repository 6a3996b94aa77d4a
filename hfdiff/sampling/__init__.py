"""The one way to draw: any pipeline is opened here, and image i of seed s is the same picture whoever asks for it."""

from ..lazy import lazy_names

__all__ = lazy_names(
    __name__,
    {
        ".opening": "OpenedPipeline open_pipeline scheduler_class",
        ".sample_files": "draw_samples join_processes",
        ".sampler": "Sampler",
        ".settings": "SamplingSettings",
        ".streams": "image_generator image_generators",
    },
)
