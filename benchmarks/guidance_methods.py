"""Guides and methods on the digits: what an independent judge says of the images, and what they cost.

    python benchmarks/guidance_methods.py --train_data ylecun/mnist --test_data ylecun/mnist --vit my/vit-digits
    python benchmarks/guidance_methods.py ... --methods vit --num_images 1000 --seeds 0 1 2 3 4 --device cuda

Guides are the bundled classifier of noisy images, the bundled judge of clean images, and a ViT of transformers trained
on clean images. Each is judged by a network that guided nothing: the bundled judge, or for the judge as a guide the
ViT. The Fréchet distance of the judge's features is divided by that of as many real training images of each class.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from hfdiff import ClassifierGuidedPipeline, CleanClassifier, GuidanceMethod
from hfdiff.data.labelled import load_images
from hfdiff.evaluation import class_accuracy, frechet_distance, load_features, precision_recall

BATCH = 250


@dataclass(frozen=True)
class Setting:
    """A row of the table: what guides, how, and by which steps."""

    guide: str
    name: str
    scale: float | Callable[[float], float] = 1.0
    method: GuidanceMethod = field(default_factory=GuidanceMethod)
    steps: int = 50
    scheduler: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    interval: tuple[float, float] = (0.0, 1.0)


SDE = {"scheduler": "DPMSolverMultistepScheduler", "config": {"algorithm_type": "sde-dpmsolver++"}}
DDIM = {"scheduler": "DDIMScheduler"}

# Networks of clean images are too sure of a blurred x_0: of held-out digits at log SNR -4 to -1, a temperature of 1/4
# and noise on x_0 raise what the gradient explains of the noise by half to twice, at its best scale.
CALIBRATED = GuidanceMethod(recurrence=4, joint_temperature=0.25, marginal_temperature=0.25, smoothing=0.6, samples=2)


def settings() -> list[Setting]:
    """The table's rows."""
    rows = [
        Setting("noisy", "DDPM", 8.0),
        Setting("noisy", "DDPM", 1.0),
        Setting("noisy", "ED-DPM", 1.0, GuidanceMethod.ed_dpm()),
        Setting("noisy", "recurrence", 1.0, GuidanceMethod(recurrence=4)),
        *(Setting("noisy", "DDIM", 8.0, steps=steps, **DDIM) for steps in (10, 5)),
        *(Setting("noisy", "SDE-DPM-Solver++ 2M", 8.0, steps=steps, **SDE) for steps in (10, 5)),
    ]
    for guide in ("judge", "vit"):
        rows += [
            Setting(guide, "DPS", 1.0),
            Setting(guide, "DPS", 4.0),
            Setting(guide, "LGD-MC", 4.0, GuidanceMethod.lgd(4)),
            Setting(guide, "MPGD", 4.0, GuidanceMethod.mpgd()),
            Setting(guide, "EluCD", 4.0, GuidanceMethod.elucd()),
            Setting(guide, "TFG", 4.0, GuidanceMethod.tfg()),
            *(
                Setting(guide, "FreeDoM", scale, GuidanceMethod.freedom(4), steps)
                for scale in (1.0, 4.0)
                for steps in (25, 50)
            ),
            *(Setting(guide, "Universal Guidance", 4.0, GuidanceMethod.universal(4), steps) for steps in (25, 50)),
            *(Setting(guide, "calibrated", scale, CALIBRATED, steps) for scale in (12.0, 30.0) for steps in (25, 50)),
            *(
                Setting(guide, "calibrated, both gradients", 12.0, replace(CALIBRATED, mu=1.0), steps)
                for steps in (25, 50)
            ),
        ]
    return rows


class Judged(NamedTuple):
    """What is measured of a set of images."""

    accuracy: float
    distance: float
    recall: float
    seconds: float


class Judge:
    """An independent network, and real images as it sees them.

    Args:
        name: of its features.
        unseen: real images that nothing was trained on, uint8 (N, C, H, W).
    """

    def __init__(self, name: str, unseen: Tensor) -> None:
        self.extractor = load_features(name)
        self.unseen = self.features(unseen)[0]

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, D) and class probabilities (N, K) of uint8 images."""
        outputs = [self.extractor(batch) for batch in images.split(BATCH)]
        return torch.cat([o.pooled for o in outputs]).cpu(), torch.cat([o.probs for o in outputs]).cpu()

    def __call__(self, images: Tensor, labels: Tensor, seconds: float) -> Judged:
        features, probs = self.features(images)
        recall = precision_recall(self.unseen, features).recall
        return Judged(class_accuracy(probs, labels).overall, self.distance(features), recall, seconds)

    def distance(self, features: Tensor) -> float:
        """Fréchet distance to the unseen images."""
        first, second = features.double(), self.unseen.double()
        return frechet_distance(first.mean(0), torch.cov(first.T), second.mean(0), torch.cov(second.T))


def draw(pipe: ClassifierGuidedPipeline, setting: Setting, labels: Tensor, seed: int) -> tuple[Tensor, float]:
    """Images in uint8, (N, C, H, W), and the seconds they took."""
    kind = type(pipe.scheduler) if setting.scheduler is None else getattr(diffusers, setting.scheduler)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **setting.config)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    images = [
        pipe(
            batch,
            setting.scale,
            setting.steps,
            generator,
            setting.interval,
            method=setting.method,
            output_type="pt",
        ).images.cpu()
        for batch in labels.split(BATCH)
    ]
    return (torch.cat(images) * 255).round().to(torch.uint8), time.perf_counter() - start


def to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] to uint8."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


def table(rows: list[tuple[Setting, list[Judged], float]]) -> str:
    """Markdown; means over the seeds, with their standard deviation where there are several."""

    def cell(values: list[float], digits: int) -> str:
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{spread}"

    lines = [
        "| guide | method | scale | steps | recurrence | accuracy | Fréchet distance / real | recall | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for setting, judged, real in rows:
        scale = "varies" if callable(setting.scale) else f"{setting.scale:g}"
        cells = [setting.guide, setting.name, scale, str(setting.steps), str(setting.method.recurrence)]
        cells += [cell([j.accuracy for j in judged], 3), cell([j.distance / real for j in judged], 2)]
        cells += [cell([j.recall for j in judged], 2), cell([j.seconds for j in judged], 1)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draws, judges, prints a line each and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", help="guides or methods to run; all by default")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="file of the table")
    parser.add_argument("--pipeline", default="pipelines/mnist-classifier-guided")
    parser.add_argument("--judge", default="pipelines/mnist-judge")
    parser.add_argument("--vit", help="folder or Hub id of an image classifier of transformers for the same classes")
    parser.add_argument("--train_data", required=True, help="real images, for the baseline: Hub id, file or folder")
    parser.add_argument("--test_data", required=True, help="real images that nothing was trained on")
    args = parser.parse_args()

    pipe = ClassifierGuidedPipeline.from_pretrained(args.pipeline, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    guides: dict[str, Any] = {"noisy": pipe.classifier}
    guides |= {} if args.vit is None else {"judge": CleanClassifier(args.judge), "vit": CleanClassifier(args.vit)}
    for module in (pipe.unet, *guides.values()):
        module.to(args.device).requires_grad_(False)
    labels = torch.arange(args.num_images) % pipe.num_classes
    train = load_images(args.train_data, split="train", label_column="label")
    unseen = to_bytes(load_images(args.test_data, split="test").images[:])
    real = torch.cat([(train.labels == k).nonzero()[: (labels == k).sum(), 0] for k in range(pipe.num_classes)])
    real = to_bytes(train.images[real])
    judges, baselines = {}, {}
    rows = []
    for setting in settings():
        asked = not args.methods or {setting.guide, setting.name} & set(args.methods)
        if setting.guide not in guides or not asked:
            continue
        name = f"classifier:{args.vit if setting.guide == 'judge' else args.judge}"
        if name not in judges:
            judges[name] = Judge(name, unseen)
            baselines[name] = judges[name].distance(judges[name].features(real)[0])
        pipe.classifier = guides[setting.guide]
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        judged = [judges[name](*draw_with_labels(pipe, setting, labels, seed)) for seed in args.seeds]
        rows.append((setting, judged, baselines[name]))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(rows))
    if args.output is not None:
        args.output.write_text(table(rows))


def draw_with_labels(
    pipe: ClassifierGuidedPipeline, setting: Setting, labels: Tensor, seed: int
) -> tuple[Tensor, Tensor, float]:
    """Images, their labels and the seconds they took; the pipeline's scheduler stays as it was."""
    scheduler = pipe.scheduler
    images, seconds = draw(pipe, setting, labels, seed)
    pipe.scheduler = scheduler
    return images, labels, seconds


if __name__ == "__main__":
    main()
