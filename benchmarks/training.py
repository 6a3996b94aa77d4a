"""Training speed beside diffusers' own script: images per second and peak memory, same data, network and batch.

    python benchmarks/training.py --diffusers_script diffusers/examples/…/train_unconditional.py

The script is that of diffusers' repository, in examples/unconditional_image_generation. Each contestant is a whole
script in a process of its own, stopped after `--steps` training steps; processes take turns for `--rounds` rounds. A
step is the time between two backward passes, so reading data, optimizer and progress bar count and start-up does not.
The images are scikit-learn's digits at 28×28.

Where torchvision is not installed, diffusers' script gets transforms with the same results made of Pillow and torch.
"""

import argparse
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles

import torch

from hfdiff.data.labelled import LabelledImages

SIZE, BATCH, WARM_UP = 28, 128, 3
NETWORK = ("--block_out_channels", "[32, 64, 64]", "--norm_num_groups", "8", "--attention_head_dim", "32")
OURS = Path(__file__).parents[1] / "training" / "train_ddpm.py"


# --- in the process of a contestant ----------------------------------------------------------------------------------


def measure(steps: int, script: str, flags: Sequence[str]) -> None:
    """Runs a script until its backward pass of this number, then prints seconds per step and megabytes, and ends."""
    import accelerate
    import datasets  # noqa: F401 - before the stand-in for torchvision, which it would look at
    import diffusers  # noqa: F401

    times: list[float] = []
    backward = accelerate.Accelerator.backward

    def timed(self: accelerate.Accelerator, loss: torch.Tensor, **kwargs: object) -> None:
        backward(self, loss, **kwargs)
        times.append(time.perf_counter())
        if len(times) > steps:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            seconds = [b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :])]
            print("\n" + json.dumps({"seconds": median(seconds), "megabytes": peak}), flush=True)
            os._exit(0)

    accelerate.Accelerator.backward = timed
    if "torchvision" not in sys.modules:
        install_transforms()
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def install_transforms() -> None:
    """A stand-in for torchvision with the few transforms that diffusers' script uses."""
    import numpy as np
    from PIL import Image, ImageOps

    def apply_all(transforms: Sequence[Callable]) -> Callable:
        def run(value: object) -> object:
            for transform in transforms:
                value = transform(value)
            return value

        return run

    def to_tensor(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)

    def crop(size: int) -> Callable:
        return lambda picture: picture if picture.size == (size, size) else ImageOps.fit(picture, (size, size))

    def resize(size: int, interpolation: int) -> Callable:
        return lambda picture: picture if min(picture.size) == size else picture.resize((size, size), interpolation)

    transforms = types.SimpleNamespace(
        Compose=apply_all,
        Resize=resize,
        CenterCrop=crop,
        RandomCrop=crop,
        Lambda=lambda function: function,
        ToTensor=lambda: to_tensor,
        PILToTensor=lambda: to_tensor,
        ConvertImageDtype=lambda dtype: lambda tensor: tensor.to(dtype),
        Normalize=lambda mean, std: lambda tensor: (tensor - mean[0]) / std[0],
        InterpolationMode=types.SimpleNamespace(BILINEAR=Image.Resampling.BILINEAR),
    )
    module = types.ModuleType("torchvision")
    module.transforms = transforms
    sys.modules["torchvision"] = module


# --- the contest -----------------------------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """The digits as RGB images of 28×28 in a parquet file, since diffusers' script trains in colour only."""
    from datasets import Dataset
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels = (load_digits().images * (255 / 16)).astype("uint8")
    pictures = [
        Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB") for image in pixels
    ]
    Dataset.from_dict({"image": pictures}).to_parquet(folder / "train.parquet")


def write_network(folder: Path) -> int:
    """The configuration of the network our script makes, for diffusers' script; returns its number of parameters."""
    settings = runpy.run_path(str(OURS))
    flags = settings["parse_settings"](settings["DDPMSettings"], [*NETWORK], "")
    unet = settings["make_unet"](flags, LabelledImages(torch.zeros(1, 3, SIZE, SIZE), None, []))
    unet.save_config(folder)
    return unet.num_parameters()


def contestants(script: str, data: Path, network: Path, out: Path) -> dict[str, list[str]]:
    """The command lines, without the interpreter."""
    common = ["--resolution", str(SIZE), "--train_batch_size", str(BATCH), "--center_crop"]
    theirs = [script, "--dataset_name", str(data), "--model_config_name_or_path", str(network), *common]
    ours = [str(OURS), "--dataset_name", str(data), *NETWORK, *common]
    ours += ["--use_ema", "false", "--max_train_steps", "10000", "--report_to", "none"]
    lines = {"diffusers": theirs, "hfdiff": ours}
    return {
        f"{name}, {precision}": [*line, "--mixed_precision", precision, "--output_dir", str(out / name)]
        for precision in ("no", "bf16")
        for name, line in lines.items()
    }


def run(line: Sequence[str], steps: int) -> dict[str, float]:
    """One contestant's process."""
    command = [sys.executable, __file__, "--measure", str(steps), *line]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{line[0]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(results: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and the speed of each contestant as a multiple of the first one's in the same round."""
    base = next(iter(results.values()))
    for name, rounds in results.items():
        speed = median(BATCH / row["seconds"] for row in rounds)
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(rounds, base)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        memory = median(row["megabytes"] for row in rounds)
        print(f"{name:16s} {speed:7.1f} images/s  x {median(ratios):.2f} ({low:.2f}-{high:.2f})  {memory:6.0f} MB")


def main() -> None:
    """Runs the contest and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers_script", required=True, help="train_unconditional.py of diffusers' repository")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="training steps of each process")
    parser.add_argument("--only", default="", help="precision to run, such as no or bf16; default: both")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, network, out = (Path(folder, name) for name in ("data", "network", "out"))
        data.mkdir()
        write_data(data)
        size = write_network(network)
        print(f"{size:,} parameters, {SIZE}×{SIZE}, batch {BATCH}, {torch.get_num_threads()} threads, ", end="")
        print(f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
        lines = contestants(args.diffusers_script, data, network, out)
        lines = {name: line for name, line in lines.items() if name.endswith(args.only)}
        results = {name: [] for name in lines}
        for _ in range(args.rounds):
            for name, line in lines.items():
                results[name].append(run(line, args.steps))
        report(results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
