"""Counterfactuals of test pictures: what an independent classifier says of them, and how little they change.

    python benchmarks/counterfactuals.py --test_data ylecun/mnist --output counterfactuals.png

Each picture is changed to another class, drawn at random. The same pipeline's drawings of these classes from noise, at
its own scale, stand beside it. The grid has the originals above their counterfactuals.
"""

import argparse
import time

import torch
from diffusers.utils import make_image_grid
from torch import Tensor

from hfdiff import ClassifierGuidedPipeline, NoisyClassifier
from hfdiff.data.labelled import load_images

CLEAN = 0  # the independent classifier's timestep: it knows clean images alone
COLUMNS = 20


def judged(judge: NoisyClassifier, images: Tensor) -> Tensor:
    """The classes of images in [0, 1], rounded to bytes as they are published."""
    with torch.no_grad():
        return judge((images * 255).round() / 127.5 - 1, CLEAN).logits.argmax(dim=-1)


def describe(
    name: str, images: Tensor, originals: Tensor, labels: Tensor, judge: NoisyClassifier, seconds: float
) -> None:
    """Prints one row of the table."""
    change = (images - originals).flatten(1)
    share = (judged(judge, images) == labels).double().mean().item()
    l2, l1 = change.norm(dim=1).mean().item(), change.abs().sum(dim=1).mean().item()
    print(f"| {name} | {share:.2f} | {l2:.2f} | {l1:.1f} | {seconds:.0f} s |")


def main() -> None:
    """Makes the counterfactuals, prints the table and writes the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="pipelines/mnist-classifier-guided")
    parser.add_argument("--judge", default="pipelines/mnist-judge")
    parser.add_argument("--test_data", required=True, help="labelled pictures: Hub id, file or folder")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--confidence", type=float, nargs="+", default=[0.99])
    parser.add_argument("--proximity", type=float, nargs="+", default=[0.4])
    parser.add_argument("--num_inference_steps", "--steps", type=int, default=20)
    parser.add_argument("--output", default="counterfactuals.png", help="the grid, of the last row")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = ClassifierGuidedPipeline.from_pretrained(args.pipeline, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    judge = NoisyClassifier.from_pretrained(args.judge, dtype=torch.float32).to(args.device)
    data = load_images(args.test_data, split="test", label_column="label").spread(args.count)
    originals, classes = (data.images / 2 + 0.5).to(args.device), data.labels
    generator = torch.Generator().manual_seed(args.seed)
    others = torch.randint(1, pipe.num_classes, (len(classes),), generator=generator)
    labels = (classes + others) % pipe.num_classes

    print(f"{len(labels)} pictures, of which {args.judge} knows", end=" ")
    print(f"{(judged(judge, originals).cpu() == classes).double().mean():.2f} as they are")
    print("| | share of the class asked for | L2 change | L1 change | time |\n|---|---|---|---|---|")
    start = time.perf_counter()
    drawn = pipe(labels, generator=generator, output_type="pt").images
    describe("redrawn from noise", drawn, originals, labels.to(drawn.device), judge, time.perf_counter() - start)
    for confidence in args.confidence:
        for proximity in args.proximity:
            start = time.perf_counter()
            output = pipe.counterfactual(
                originals,
                labels,
                num_inference_steps=args.num_inference_steps,
                confidence=confidence,
                proximity=proximity,
                output_type="pt",
            )
            name, seconds = f"confidence {confidence}, proximity {proximity}", time.perf_counter() - start
            describe(name, output.images, originals, labels.to(drawn.device), judge, seconds)
    accepted = (output.probabilities >= confidence).double().mean().item()
    print(f"accepted {accepted:.2f}; mean strength {output.strengths.mean():.2f}, scale {output.scales.mean():.1f}")

    rows = [rows for pair in zip(originals.split(COLUMNS), output.images.split(COLUMNS)) for rows in pair]
    pictures = [picture for row in rows for picture in pipe.numpy_to_pil(row.permute(0, 2, 3, 1).cpu().numpy())]
    make_image_grid([picture.resize((56, 56)) for picture in pictures], len(rows), len(rows[0])).save(args.output)


if __name__ == "__main__":
    main()
