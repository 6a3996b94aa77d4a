"""Trains a classifier of noisy images (Dhariwal & Nichol 2021): `hfdiff train classifier`, for `accelerate launch`."""

import sys

from hfdiff.commands.train import main

if __name__ == "__main__":
    main(["classifier", *sys.argv[1:]])
