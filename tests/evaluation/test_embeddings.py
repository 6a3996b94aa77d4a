"""DINOv2's and CLIP's features and their metrics, against the formulas on features computed here."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hfdiff import cli
from hfdiff.evaluation.networks import load_features

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
MEAN, STD = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.25])
MIDDLE = (2, 0, 22, 20)  # the square of 20 in an image of 24 by 20: left, top, right, bottom
CROPPING = {  # as the published processors, which would crop
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 28, "width": 28},
    "image_mean": MEAN.tolist(),
    "image_std": STD.tolist(),
    "resample": 3,
}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    model = Dinov2Model(Dinov2Config(**SIZES, layerscale_value=1.0)).eval()
    model.save_pretrained(folder)
    BitImageProcessorPil(**CROPPING).save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("clip")
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9, "intermediate_size": 8}
    vision = {**SIZES, "intermediate_size": 8, "projection_dim": 6}  # written twice in published configs, too
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    model.save_pretrained(folder)
    CLIPImageProcessorPil(**CROPPING).save_pretrained(folder)
    return model.eval(), folder


def draw(count, seed):
    return np.random.default_rng(seed).integers(256, size=(count, 20, 24, 3), dtype=np.uint8)


def pixels_of(images, box=None):
    """Images, or what is in a box of them, resized by Pillow's bicubic filter to 28 by 28 and normalised."""
    cropped = [Image.fromarray(image).crop(box or (0, 0, 24, 20)) for image in images]
    small = np.stack([np.array(image.resize((28, 28), Image.Resampling.BICUBIC)) for image in cropped])
    return torch.from_numpy(((small / 255 - MEAN) / STD).transpose(0, 3, 1, 2)).float()


@torch.no_grad()
def tokens_of(model, images):
    hidden = model.embeddings(pixels_of(images))
    for layer in model.layers if hasattr(model, "layers") else model.encoder.layer:
        hidden = layer(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return model.layernorm(hidden)[:, 0].double().numpy()


@torch.no_grad()
def embeddings_of(model, images):
    pooled = model.vision_model(pixels_of(images, MIDDLE)).pooler_output
    projected = (pooled @ model.visual_projection.weight.T).double().numpy()
    return projected / np.linalg.norm(projected, axis=1, keepdims=True)


def report_of(tmp_path, features, metrics, samples, reference):
    for name, images in (("samples", samples), ("reference", reference)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    flags = ["--samples", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "reference.npz")]
    cli.main(["evaluate", *flags, "--features", features, "--metrics", metrics, "--output", str(tmp_path / "r.json")])
    return json.loads((tmp_path / "r.json").read_text())["metrics"]


def test_fd_dinov2_is_the_formula_on_its_own_features(dinov2, tmp_path):
    model, folder = dinov2
    samples, reference = draw(40, 0), draw(50, 1) // 2
    found = report_of(tmp_path, f"dinov2:{folder}", "fid", samples, reference)["fid"]
    x, y = tokens_of(model, samples), tokens_of(model, reference)
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert found == pytest.approx(expected, rel=1e-4)


def test_cmmd_is_the_formula_on_clips_embeddings(clip, tmp_path):
    model, folder = clip
    samples, reference = draw(7, 0), draw(9, 1) // 2
    found = report_of(tmp_path, f"clip:{folder}", "cmmd", samples, reference)["cmmd"]
    x, y = embeddings_of(model, samples), embeddings_of(model, reference)

    def similarity(left, right):
        return np.mean([[np.exp(-np.sum((a - b) ** 2) / 200) for b in right] for a in left])

    expected = 1000 * (similarity(x, x) + similarity(y, y) - 2 * similarity(x, y))
    assert expected > 0.01
    assert found == pytest.approx(expected, rel=1e-3)


def test_grey_images_are_seen_as_grey_in_colours(dinov2):
    grey = torch.randint(256, (3, 1, 20, 24), dtype=torch.uint8)
    extractor = load_features(f"dinov2:{dinov2[1]}")
    assert torch.equal(extractor(grey).pooled, extractor(grey.expand(-1, 3, -1, -1)).pooled)
    assert extractor(grey).probs is None


def test_weights_that_torch_wrote_are_opened_and_recorded(dinov2, tmp_path):
    model, folder = dinov2
    for file in folder.glob("*.json"):
        shutil.copy(file, tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    images = torch.from_numpy(draw(3, 0)).permute(0, 3, 1, 2)
    extractor = load_features(f"dinov2:{tmp_path}")
    assert torch.equal(extractor(images).pooled, load_features(f"dinov2:{folder}")(images).pooled)
    expected = hashlib.sha256((tmp_path / "pytorch_model.bin").read_bytes()).hexdigest()
    assert extractor.provenance["weights_sha256"] == expected


def test_a_processor_that_does_not_crop_says_the_square_by_its_edge(dinov2, tmp_path):
    from transformers import BitImageProcessorPil

    shutil.copytree(dinov2[1], tmp_path, dirs_exist_ok=True)
    BitImageProcessorPil(**{**CROPPING, "size": {"shortest_edge": 28}, "do_center_crop": False}).save_pretrained(
        tmp_path
    )
    images = torch.from_numpy(draw(3, 0)).permute(0, 3, 1, 2)
    features = [load_features(f"dinov2:{folder}")(images).pooled for folder in (tmp_path, dinov2[1])]
    assert torch.equal(*features)


@pytest.mark.parametrize(
    ("source", "metrics", "message"),
    [
        ("clip:dinov2", "cmmd", "`--features` must name a clip .*model_type is 'dinov2'"),
        ("dino:dinov2", "fid", '`--features` must be "inception".*got \'dino:'),
        ("dinov2:dinov2", "fid,accuracy", "`--features` must be of a classifier for accuracy, got 'dinov2:"),
        ("dinov2:dinov2", "is", "`--features` must be of a classifier for is, got 'dinov2:"),
        ("clip:clip", "worst_class_accuracy", "`--features` must be of a classifier for worst_class_accuracy"),
        ("clip:unprojected", "cmmd", "`--features` must name a clip .*1 of its weights .*visual_projection.weight"),
        ("clip:wide", "cmmd", "`--features` must name a clip .*1 of its weights .*visual_projection.weight"),
        ("dinov2:cut", "fid", "`--features` must name a dinov2 .*header"),
        ("dinov2:nobody/nothing", "fid", "`--features` must name a folder or a Hub id, got 'nobody/nothing'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_drawn(
    source, metrics, message, dinov2, clip, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("hfdiff.sampling.sample_files.draw_samples", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name, (_, folder) in {"dinov2": dinov2, "clip": clip, "cut": dinov2, "unprojected": clip, "wide": clip}.items():
        shutil.copytree(folder, name)
    with open("cut/model.safetensors", "r+b") as file:
        file.truncate(200)
    weights = load_file("unprojected/model.safetensors")
    projection = weights.pop("visual_projection.weight")
    save_file(weights, "unprojected/model.safetensors", metadata={"format": "pt"})
    weights["visual_projection.weight"] = projection.repeat(2, 1)
    save_file(weights, "wide/model.safetensors", metadata={"format": "pt"})
    np.savez("reference.npz", arr_0=draw(4, 0))
    flags = ["--samples", "hfdiff/mnist-classifier-guided", "--num_images", "4", "--metrics", metrics]
    assert cli.main(["evaluate", *flags, "--features", source, "--reference", "reference.npz"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hfdiff evaluate: ")]
    assert len(told) == 1
    assert re.search(message, told[0])
