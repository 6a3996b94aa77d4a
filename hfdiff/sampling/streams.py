"""The stream of noise of image i of seed s."""

import numpy as np
import torch

SEEDS = 2**32  # torch's generators on CPUs read no more of a seed


def image_generator(seed: int, index: int) -> torch.Generator:
    """The stream of noise of one image.

    Torch's generators on CPUs tell 2³² seeds apart. Those of a set are consecutive, so no two of its images are alike;
    they begin at a hash of `seed`, so the sets of two seeds hardly ever share an image.
    """
    first = int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])
    return torch.Generator().manual_seed((first + index) % SEEDS)


def image_generators(seed: int, count: int) -> list[torch.Generator]:
    """The streams of the first images of a seed."""
    return [image_generator(seed, index) for index in range(count)]
