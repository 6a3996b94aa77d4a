"""hfdiff: DDPM and classifier-guided diffusion for the Hugging Face ecosystem."""

from .models.noisy_classifier import NoisyClassifier
from .pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from .schedulers.scheduling_ddpm import DDPMScheduler

__all__ = ["ClassifierGuidedPipeline", "DDPMScheduler", "NoisyClassifier"]
