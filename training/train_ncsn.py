"""Trains a noise conditional score network (Song & Ermon 2019): `hfdiff train ncsn`, for `accelerate launch`."""

import sys

from hfdiff.commands.train import main

if __name__ == "__main__":
    main(["ncsn", *sys.argv[1:]])
