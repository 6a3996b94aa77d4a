"""What to draw from a pipeline. It is checked before slow imports, so nothing here needs torch."""

import math
from dataclasses import dataclass

LABEL_POLICIES = ("balanced", "random", "given")


@dataclass(frozen=True)
class SamplingSettings:
    """What to draw.

    Args:
        num_images: N.
        label_policy: "balanced", the classes in turn; "random", each class as likely; "given", `class_labels` in turn.
            By default "given" where these are, else "balanced" where the pipeline takes labels.
        class_labels: names or indices of classes.
        guidance_scale: w; the pipeline's own by default.
        num_inference_steps: model calls per image; the pipeline's own number by default.
        scheduler: a scheduler of diffusers by its class name, like "DDIM", or "AnnealedLangevin"; the pipeline's own by
            default, which its own class name also means.
        seed: of the noise and of random labels.
        sampling_batch_size: images drawn together.

    Raises:
        ValueError: for a value out of its range, or labels without their policy.
    """

    num_images: int
    label_policy: str | None = None
    class_labels: tuple[int | str, ...] | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    scheduler: str | None = None
    seed: int = 0
    sampling_batch_size: int = 50

    def __post_init__(self) -> None:
        least = {"num_images": 1, "num_inference_steps": 1, "seed": 0, "sampling_batch_size": 1}
        for name, smallest in least.items():
            if (value := getattr(self, name)) is not None and value < smallest:
                raise ValueError(f"`{name}` must be at least {smallest}, got {value}.")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"`guidance_scale` must be finite and at least 0, got {self.guidance_scale}; 0 switches guidance off."
            )
        policy = self.label_policy or ("given" if self.class_labels else None)
        if policy not in (None, *LABEL_POLICIES):
            raise ValueError(f"`label_policy` must be one of {LABEL_POLICIES}, got {policy!r}; choose one of these.")
        if (policy == "given") != bool(self.class_labels):
            raise ValueError(
                f'`class_labels` and the `label_policy` "given" go together, got {self.class_labels} with {policy!r}; '
                "give both or neither."
            )
        object.__setattr__(self, "label_policy", policy)
