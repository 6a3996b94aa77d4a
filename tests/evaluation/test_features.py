import hashlib
import sys

import pytest
import torch
from torch import nn

from hfdiff import NoisyClassifier
from hfdiff.evaluation.features import ImageFeatures, ModuleFeatures, first_channels, match_channels
from hfdiff.evaluation.inception import InceptionFeatures
from hfdiff.evaluation.networks import load_features


def images(channels=3, size=8, count=4):
    return torch.randint(256, (count, channels, size, size), dtype=torch.uint8)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    model = NoisyClassifier(
        sample_size=8, in_channels=1, num_classes=3, model_channels=8, channel_mult=(1, 2), norm_num_groups=4,
        num_head_channels=8, attention_downsamples=()
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("noisy")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        num_labels=5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vit")
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_noisy_classifier_at_timestep_0(classifier):
    model, folder = classifier
    batch = images(channels=1)
    x0 = batch.float() / 127.5 - 1
    found = load_features(f"classifier:{folder}")(batch)
    torch.testing.assert_close(found.pooled, model.features(x0, 0))
    torch.testing.assert_close(found.probs, model(x0, 0).logits.softmax(dim=-1))
    assert found.spatial.shape == (4, 4 * 4 * 7)  # the last map has 4 by 4 positions


@torch.no_grad()
def test_transformers_classifier(vit):
    """The last linear layer maps the features to the logits; the default processor maps bytes to [-1, 1]."""
    model, folder = vit
    batch = images()
    extractor = load_features(f"classifier:{folder}")
    found = extractor(batch)
    logits = model(batch.float() / 127.5 - 1).logits
    torch.testing.assert_close(found.probs, logits.softmax(dim=-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.classifier(found.pooled), logits, rtol=1e-4, atol=1e-5)
    assert found.spatial is None
    assert extractor.provenance["resize"]["size"] == {"height": 8, "width": 8}


def test_module_is_evaluated_as_it_is_measured():
    module = nn.Sequential(nn.Flatten(), nn.Dropout())
    extractor = ModuleFeatures(module, "pixels")
    batch = images()
    assert not module.training
    assert torch.equal(extractor(batch).pooled, batch.flatten(1))


def test_module_may_give_everything():
    class Network(nn.Module):
        def forward(self, batch):
            return ImageFeatures(batch.flatten(1), probs=torch.ones(len(batch), 1))

    assert ModuleFeatures(Network(), "net")(images(count=2)).probs.tolist() == [[1], [1]]


def test_checksums_tell_weights_apart(classifier):
    _, folder = classifier
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    provenance = load_features(f"classifier:{folder}").provenance
    assert provenance["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    sums = {ModuleFeatures(module, "m").provenance["weights_sha256"] for module in (first, second, first)}
    assert len(sums) == 2


def test_channels_change_only_without_loss():
    grey = images(channels=1)
    assert torch.equal(match_channels(grey, 3), grey.repeat(1, 3, 1, 1))
    assert torch.equal(match_channels(match_channels(grey, 3), 1), grey)
    with pytest.raises(ValueError, match="got colours"):
        match_channels(images(), 1)


def test_spatial_features_are_ordered_by_position():
    """As TensorFlow's (height, width, channel), so that mu_s of guided-diffusion's files belongs to them."""
    maps = torch.arange(9)[None, :, None, None] + 100 * torch.arange(2)[:, None] + 1000 * torch.arange(2)
    expected = [1000 * column + 100 * row + channel for row in (0, 1) for column in (0, 1) for channel in range(7)]
    assert first_channels(maps).tolist() == [expected]


def test_what_is_not_there_is_refused(classifier, tmp_path):
    with pytest.raises(ValueError, match="`features` must be"):
        load_features("resnet")
    with pytest.raises(ValueError, match="with weights"):
        load_features(f"classifier:{classifier[1]}", weights="file.pth")
    for name in (tmp_path, "not a name"):
        with pytest.raises(ValueError, match="`features` must name a folder"):
            load_features(f"classifier:{name}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="NoisyClassifier or an image classifier"):
        load_features(f"classifier:{tmp_path}")
    with pytest.raises(ValueError, match="8 by 8 pixels, got 9 by 9"):
        load_features(f"classifier:{classifier[1]}")(images(1, size=9))


class Network(nn.Module):
    """A stand-in for torch-fidelity's network, with its signature and its names."""

    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 9, 1)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, batch):
        maps = self.Mixed_6d.branch1x1(batch.float())
        return maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))


@pytest.fixture
def torch_fidelity(monkeypatch, tmp_path):
    module = type(sys)("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3, module.URL_INCEPTION_V3 = Network, "file:///nowhere/weights-0123abcd.pth"
    monkeypatch.setitem(sys.modules, "torch_fidelity", type(sys)("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    convolution = nn.Conv2d(3, 9, 1)
    return {f"Mixed_6d.branch1x1.{name}": value for name, value in convolution.state_dict().items()}


@torch.no_grad()
def test_inception_by_path_and_cache(torch_fidelity, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    batch = images(channels=1)
    torch.save(torch_fidelity, tmp_path / "weights.pth")
    torch.save(torch_fidelity, tmp_path / "checkpoints" / "weights-0123abcd.pth")
    by_path, by_cache = load_features("inception", weights=tmp_path / "weights.pth"), load_features("inception")
    found = by_path(batch)
    assert torch.equal(found.pooled, by_cache(batch).pooled)
    assert found.spatial.shape == (4, 8 * 8 * 7)
    torch.testing.assert_close(found.spatial.view(4, 64, 7).mean(dim=1), found.pooled[:, :7])
    torch.testing.assert_close(found.probs.sum(dim=1), torch.ones(4))


def test_inception_says_what_to_fetch(torch_fidelity, tmp_path):
    with pytest.raises(ValueError, match=r"fetch file:///nowhere/weights-0123abcd\.pth .*--weights"):
        InceptionFeatures()
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a file of torch")
    for name in ("other.pth", "broken.pth", "absent.pth"):
        with pytest.raises(ValueError, match=f"`weights` must be.*{name}"):
            InceptionFeatures(tmp_path / name)


def test_inception_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r"pip install 'hfdiff\[eval\]'"):
        load_features("inception")
