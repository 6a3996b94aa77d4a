"""Trains a denoising diffusion model (Ho et al. 2020): `hfdiff train ddpm`, for `accelerate launch`."""

import sys

from hfdiff.commands.train import main

if __name__ == "__main__":
    main(["ddpm", *sys.argv[1:]])
