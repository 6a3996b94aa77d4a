"""`hfdiff train guided|ddpm|classifier|ncsn`: the trainings, also under `accelerate launch -m hfdiff train …`."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .flags import check_path

KINDS = {
    "guided": "a diffusion model and then a classifier to guide it, in a given time",
    "ddpm": "a denoising diffusion model (Ho et al. 2020)",
    "classifier": "a classifier of noisy images, to guide one (Dhariwal & Nichol 2021)",
    "ncsn": "a noise conditional score network (Song & Ermon 2019, 2020)",
}
SOURCES = ("dataset_name", "validation_data", "init_from", "diffusion_model", "teacher", "judge", "fid_features")
HELP = """usage: hfdiff train KIND [--config recipe.yaml] [--setting value ...]

Trains a model with accelerate, and saves it as a folder that opens with `from_pretrained`. Kinds:
{kinds}

examples:
  hfdiff train guided --train_data_dir my_pictures --output_dir out/mine    # all of it, in 15 minutes

  hfdiff train ddpm                                        # digits of scikit-learn, a minute on a CPU
  hfdiff train classifier                                  # to guide what the first one made
  hfdiff train ncsn
  hfdiff train ddpm --train_data_dir my_pictures --resolution 32 --output_dir out/mine
  accelerate launch -m hfdiff train ddpm --config training/recipes/mnist-ddpm.yaml

`hfdiff train KIND --help` lists a kind's settings."""


def main(arguments: Sequence[str]) -> None:
    """Trains what the first argument names, with the settings in the others; ends the process where it cannot."""
    kind, *flags = arguments or ["--help"]
    if kind in ("-h", "--help"):
        print(HELP.format(kinds="\n".join(f"  {name:<12}{what}" for name, what in KINDS.items())))
        return
    if kind not in KINDS:
        print(f"hfdiff train: expected one of {', '.join(KINDS)}, got {kind!r}.", file=sys.stderr)
        sys.exit(2)

    from ..data.process import run_script
    from ..training.config import parse_settings
    from ..training.settings import SETTINGS

    name = f"hfdiff train {kind}"
    settings = parse_settings(SETTINGS[kind], flags, f"Trains {KINDS[kind]}.", name)

    def run() -> None:
        check_sources(settings)
        import_module(f"..training.train_{kind}", __package__).run(settings)

    run_script(run, name)


def check_sources(settings: Any) -> None:
    """Refuses paths where nothing is, before anything is imported.

    Raises:
        ValueError: then.
    """
    folder = settings.train_data_dir
    if folder is not None and not Path(folder).exists():
        raise ValueError(f"`train_data_dir` must be a folder, got {folder!r}: there is none; check the path.")
    for name in SOURCES:
        check_path(name, getattr(settings, name, None))
