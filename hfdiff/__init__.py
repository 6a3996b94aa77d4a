"""hfdiff: DDPM, NCSN and classifier-guided diffusion for the Hugging Face ecosystem."""

from .models.adm_unet import ADMUNet
from .models.ncsn import NCSNModel
from .models.ncsnv2 import NCSNv2Model
from .models.noisy_classifier import NoisyClassifier
from .pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from .pipelines.pipeline_ncsn import NCSNPipeline
from .schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from .schedulers.scheduling_ddim import DDIMScheduler
from .schedulers.scheduling_ddpm import DDPMScheduler

__all__ = [
    "ADMUNet",
    "AnnealedLangevinScheduler",
    "ClassifierGuidedPipeline",
    "DDIMScheduler",
    "DDPMScheduler",
    "NCSNModel",
    "NCSNPipeline",
    "NCSNv2Model",
    "NoisyClassifier",
]
