"""`hfdiff bits-per-dim`: the variational bound of a diffusion model on a dataset, as numbers, a table and a plot."""

import argparse
import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flags import check_output, check_path

if TYPE_CHECKING:
    import torch

    from ..evaluation.bits_per_dim import BitsPerDim
    from ..schedulers.scheduling_ddpm import DDPMScheduler

TABLE_ROWS = 10  # that are printed; the CSV file has a row per timestep


def add_parser(commands: Any) -> None:
    """Adds the command to those of `hfdiff`."""
    command = commands.add_parser("bits-per-dim", help="bound a diffusion model's negative log-likelihood of images")
    command.set_defaults(run=run)
    command.add_argument("--pipeline", required=True, help="folder or Hub id of a pipeline with a UNet and a scheduler")
    command.add_argument(
        "--dataset_name", default="digits", help='parquet file, folder, Hub id, or "digits", scikit-learn\'s'
    )
    command.add_argument("--split", default="test", help='"train" or "test"; a file is taken whole')
    command.add_argument("--image_column", default="image", help="the dataset's column of images")
    command.add_argument("--label_column", default="label", help="its column of labels, for a class-conditional model")
    command.add_argument("--num_images", "--num", type=int, help="the first so many images; all by default")
    command.add_argument("--respacing", help='the bound of a shorter chain: "250", "10,15,20" or "ddim25"')
    command.add_argument("--batch_size", type=int, default=256, help="images per model call")
    command.add_argument("--seed", type=int, default=0, help="of the noise")
    command.add_argument("--output", type=Path, default=Path("out/bits-per-dim"), help="folder of table and plot")


def run(args: argparse.Namespace) -> None:
    """Computes the bound, prints it, and writes `bits_per_dim.json`, `.csv`, with a row per timestep, and `.png`.

    Raises:
        ValueError: when the model, the images or the chain are not there or do not belong together.
    """
    for name in ("num_images", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    check_path("pipeline", args.pipeline)
    check_path("dataset_name", args.dataset_name)
    check_output("output", args.output)

    import torch

    from ..evaluation.bits_per_dim import bits_per_dim

    unet, scheduler = load_model(args.pipeline)
    if args.respacing:
        scheduler.set_timesteps(respacing=args.respacing)
    x0, labels = load_data(args, unet)
    generator = torch.Generator().manual_seed(args.seed)
    result = bits_per_dim(
        unet.to("cuda" if torch.cuda.is_available() else "cpu"),
        scheduler,
        x0,
        generator=generator,
        class_labels=labels,
        batch_size=args.batch_size,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    summary = summarize(result, args)
    (args.output / "bits_per_dim.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_terms(result, args.output / "bits_per_dim.csv")
    plot_terms(result, args.output / "bits_per_dim.png")
    print(
        "{bits_per_dim:.4f} ± {standard_error:.4f} bits per dimension of {num_images} images: prior {prior:.4f}, "
        "L_0 {L_0:.4f}, the other terms {other_terms:.4f}".format(**summary)
    )
    print(format_terms(result))
    print(f"{args.output}: bits_per_dim.json, .csv and .png")


def load_model(pipeline: str) -> tuple[Any, "DDPMScheduler"]:
    """The UNet of a pipeline, and the chain of its scheduler, whichever of diffusers' schedulers that is.

    Raises:
        ValueError: when they are not there.
    """
    from diffusers import AutoModel

    from ..schedulers.scheduling_ddpm import DDPMScheduler

    try:
        unet = AutoModel.from_pretrained(pipeline, subfolder="unet")
        return unet.eval(), DDPMScheduler.from_pretrained(pipeline, subfolder="scheduler")
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"`pipeline` must be the folder or Hub id of a pipeline with a UNet, got {pipeline!r}: {reason}"
        ) from error


def load_data(args: argparse.Namespace, unet: Any) -> "tuple[torch.Tensor, torch.Tensor | None]":
    """The images, in the model's size, and their labels, for a class-conditional model."""
    from ..data.labelled import load_images

    config = unet.config
    size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    data = load_images(
        args.dataset_name,
        args.split,
        image_column=args.image_column,
        label_column=args.label_column if config.get("num_class_embeds") else None,
        resolution=size,
    )
    if data.images.shape[1] != config.in_channels:
        raise ValueError(
            f"`dataset_name` must have images of the model's {config.in_channels} channels, got "
            f"{data.images.shape[1]}; name the model's own data."
        )
    labels = data.labels if config.get("num_class_embeds") else None
    return data.images[: args.num_images], None if labels is None else labels[: args.num_images]


def summarize(result: "BitsPerDim", args: argparse.Namespace) -> dict[str, Any]:
    """The numbers that are reported, in bits per dimension, and where they come from."""
    count = len(result.per_image)
    return {
        "bits_per_dim": result.total.item(),
        "standard_error": result.per_image.std().item() / count**0.5 if count > 1 else 0.0,
        "prior": result.prior.item(),
        "L_0": result.vb[0].item(),
        "other_terms": result.vb[1:].sum().item(),
        "num_images": count,
        "num_timesteps": len(result.vb),
        **{name: getattr(args, name) for name in ("pipeline", "dataset_name", "split", "respacing", "seed")},
    }


def format_terms(result: "BitsPerDim") -> str:
    """The terms, summed over about ten equal parts of the chain, with the mean squared errors there."""
    import torch

    lines = [f"{'timesteps':>12} {'bits/dim':>9} {'MSE of ε':>9} {'MSE of x_0':>11}"]
    for rows in torch.arange(len(result.vb)).tensor_split(min(TABLE_ROWS, len(result.vb))):
        span = f"{result.timesteps[rows[0]]} to {result.timesteps[rows[-1]]}"
        numbers = result.vb[rows].sum(), result.mse[rows].mean(), result.x0_mse[rows].mean()
        lines.append("{:>12} {:9.4f} {:9.4f} {:11.4f}".format(span, *map(float, numbers)))
    return "\n".join(lines)


def write_terms(result: "BitsPerDim", path: Path) -> None:
    """A row per timestep, ascending."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["timestep", "bits_per_dim", "eps_mse", "x0_mse"])
        writer.writerows(zip(*(column.tolist() for column in (result.timesteps, result.vb, result.mse, result.x0_mse))))


def plot_terms(result: "BitsPerDim", path: Path) -> None:
    """The terms and the errors of ε and x_0 over the timestep (as in Nichol & Dhariwal 2021, figure 2)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    terms, errors = figure.subplots(1, 2)
    terms.plot(result.timesteps, result.vb, marker="." if len(result.vb) < 50 else None)
    terms.set(ylabel="term of the bound (bits/dim)", yscale="log", xscale="symlog", xlim=(0, None))
    errors.plot(result.timesteps, result.mse, label="ε")
    errors.plot(result.timesteps, result.x0_mse, label="$x_0$")
    errors.set(ylabel="mean squared error", yscale="log")
    errors.legend()
    for axes in (terms, errors):
        axes.set_xlabel("timestep (larger is noisier)")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
