"""Quality of guided samples: what an independent classifier says of them, and their distance from unseen real images.

    python benchmarks/quality.py --train_data ylecun/mnist --test_data ylecun/mnist
    python benchmarks/quality.py ... --scheduler DDIM --steps 25

The Fréchet distance is that of the independent classifier's features. It depends on how many images there are in all
and of each class, so as many real training images of each class, measured in the same way, stand beside it.
"""

import argparse

import torch
from torch import Tensor

from hfdiff import ClassifierGuidedPipeline, NoisyClassifier
from hfdiff.data.labelled import load_images
from hfdiff.evaluation import frechet_distance
from hfdiff.sampling import OpenedPipeline, Sampler, SamplingSettings

CLEAN = 0  # the independent classifier's timestep: it knows clean images alone


@torch.no_grad()
def judge_images(judge: NoisyClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) and classes (N,) of images (N, C, H, W) in [-1, 1]."""
    features = torch.cat([judge.features(batch, CLEAN) for batch in images.split(250)])
    classes = torch.cat([judge(batch, CLEAN).logits.argmax(dim=-1) for batch in images.split(250)])
    return features, classes


def pick(labels: Tensor, classes: list[int], count: int, seed: int) -> Tensor:
    """Indices of `count` random images of each class."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(labels == label).nonzero().flatten() for label in classes]
    return torch.cat([row[torch.randperm(len(row), generator=generator)[:count]] for row in rows])


def distance(first: Tensor, second: Tensor) -> float:
    """Fréchet distance between two sets of features."""
    return frechet_distance(first.mean(0), torch.cov(first.T), second.mean(0), torch.cov(second.T))


def main() -> None:
    """Draws the images, judges them and prints one table row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="pipelines/mnist-classifier-guided")
    parser.add_argument("--judge", default="pipelines/mnist-judge")
    parser.add_argument("--train_data", required=True, help="real images, for the baseline: Hub id, file or folder")
    parser.add_argument("--test_data", required=True, help="real images that nothing was trained on")
    parser.add_argument("--scheduler", help="a scheduler of diffusers; the pipeline's own by default")
    parser.add_argument("--guidance_scale", "--scale", type=float, help="guidance scale; the pipeline's own by default")
    parser.add_argument("--num_inference_steps", "--steps", type=int, default=50)
    parser.add_argument("--per_class", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = ClassifierGuidedPipeline.from_pretrained(args.pipeline, dtype=torch.float32)
    judge = NoisyClassifier.from_pretrained(args.judge, dtype=torch.float32)
    classes = list(pipe.classifier.id2label)
    labels = torch.tensor(classes).repeat_interleave(args.per_class)

    settings = SamplingSettings(
        len(labels),
        class_labels=tuple(labels.tolist()),
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        scheduler=args.scheduler,
        seed=args.seed,
    )
    sampler = Sampler(OpenedPipeline(pipe), settings)
    images = torch.from_numpy(sampler.draw_all(progress=True)).permute(0, 3, 1, 2)
    features, seen = judge_images(judge, images / 127.5 - 1)
    real, _ = judge_images(judge, load_images(args.test_data, split="test").images[:])
    train = load_images(args.train_data, split="train", label_column="label")
    chosen = pick(train.labels, classes, args.per_class, args.seed)
    baseline, _ = judge_images(judge, train.images[chosen])

    correct = (seen == labels).double()
    worst = min(correct[labels == label].mean().item() for label in classes)
    ours, theirs = distance(features, real), distance(baseline, real)
    kind = type(sampler.scheduler).__name__
    print(f"{kind}, {args.num_inference_steps} steps, scale {pipe.guidance_scale}, N = {len(labels)}")
    print(f"accuracy {correct.mean():.3f}, of the worst class {worst:.2f}")
    print(
        f"Fréchet distance to {len(real)} unseen images {ours:.3f}; {len(chosen)} training images {theirs:.3f}", end=""
    )
    print(f"; ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
