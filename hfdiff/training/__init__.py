"""Training: `hfdiff train ddpm|classifier|ncsn`, and the losses, which are pure functions and stand alone."""

from ..lazy import lazy_names

__all__ = lazy_names(__name__, {".losses": "classification_loss ddpm_loss ddpm_losses guided_denoising_loss"})
