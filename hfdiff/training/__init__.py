"""What the training scripts share: settings, data, losses and the loop.

The losses are pure functions and stand alone; `config`, `data` and `loop` serve the scripts in `training/`.
"""

from .losses import classification_loss, ddpm_loss, ddpm_losses, guided_denoising_loss

__all__ = ["classification_loss", "ddpm_loss", "ddpm_losses", "guided_denoising_loss"]
