"""hfdiff: DDPM, NCSN and classifier-guided diffusion for the Hugging Face ecosystem."""

from typing import TYPE_CHECKING

from .lazy import announce, lazy_names

if TYPE_CHECKING:
    from .models.adm_unet import ADMUNet
    from .models.classifier_set import ClassifierSet
    from .models.clean_classifier import CleanClassifier
    from .models.ncsn import NCSNModel
    from .models.ncsnv2 import NCSNv2Model
    from .models.noisy_classifier import NoisyClassifier
    from .pipelines.composition import Both, Either, Not
    from .pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
    from .pipelines.pipeline_ncsn import NCSNPipeline
    from .pipelines.training_free import GuidanceMethod
    from .schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
    from .schedulers.scheduling_ddim import DDIMScheduler
    from .schedulers.scheduling_ddpm import DDPMScheduler

__all__ = [
    "ADMUNet",
    "AnnealedLangevinScheduler",
    "Both",
    "ClassifierGuidedPipeline",
    "ClassifierSet",
    "CleanClassifier",
    "DDIMScheduler",
    "DDPMScheduler",
    "Either",
    "GuidanceMethod",
    "NCSNModel",
    "NCSNPipeline",
    "NCSNv2Model",
    "NoisyClassifier",
    "Not",
]

_HOMES = {
    ".models.adm_unet": "ADMUNet",
    ".models.classifier_set": "ClassifierSet",
    ".models.clean_classifier": "CleanClassifier",
    ".models.ncsn": "NCSNModel",
    ".models.ncsnv2": "NCSNv2Model",
    ".models.noisy_classifier": "NoisyClassifier",
    ".pipelines.composition": "Both Either Not",
    ".pipelines.pipeline_classifier_guided": "ClassifierGuidedPipeline",
    ".pipelines.pipeline_ncsn": "NCSNPipeline",
    ".pipelines.training_free": "GuidanceMethod",
    ".schedulers.scheduling_annealed_langevin": "AnnealedLangevinScheduler",
    ".schedulers.scheduling_ddim": "DDIMScheduler",
    ".schedulers.scheduling_ddpm": "DDPMScheduler",
}
lazy_names(__name__, _HOMES)
for _home in _HOMES:
    announce(f"{__name__}{_home}")
