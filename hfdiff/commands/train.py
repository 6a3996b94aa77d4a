"""`hfdiff train`: stub until the training's own file is here."""

from collections.abc import Sequence

KINDS = {"ddpm": "a diffusion model", "classifier": "a classifier of noisy images", "ncsn": "a score network"}


def main(arguments: Sequence[str]) -> None:
    """Trains."""
    raise NotImplementedError
