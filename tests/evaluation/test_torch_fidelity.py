"""FID of PNG files with torch-fidelity's network, as torch-fidelity itself computes it.

In a process of its own: torch-fidelity imports torchvision, of which it needs here only what makes a tensor of a
picture.
"""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

SCRIPT = """
import functools, importlib.util, json, sys, types
from unittest import mock
import numpy as np, torch

modules = {}
if importlib.util.find_spec("torchvision") is None:
    def pil_to_tensor(picture):
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def compose(steps):
        return lambda picture: functools.reduce(lambda value, step: step(value), steps, picture)

    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    modules = {name: types.ModuleType(name) for name in names}
    top, datasets, transforms, functional = modules.values()
    datasets.CIFAR10 = datasets.STL10 = datasets.CIFAR100 = object
    top.transforms, transforms.functional = transforms, functional
    functional.pil_to_tensor, transforms.Compose = pil_to_tensor, compose

from hfdiff import cli  # before torchvision seems to be there

with mock.patch.dict(sys.modules, modules):
    import torch_fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    def without_download(*_, **__):  # the weights of a new network
        raise StopIteration

    torch.manual_seed(0)
    with mock.patch("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", without_download):
        network = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
        try:
            network.__init__("inception", ["2048"])
        except StopIteration:
            pass
    for module in network.modules():  # whose maps keep the images apart
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), "weights.pth")
    found = torch_fidelity.calculate_metrics(
        input1="samples", input2="real", fid=True, isc=True, isc_splits=1, samples_shuffle=False, batch_size=8,
        cuda=False, verbose=False, save_cpu_ram=True, cache=False, feature_extractor_weights_path="weights.pth",
    )
    arguments = "evaluate --samples samples --reference real --features inception --weights weights.pth"
    options = "--metrics fid,is --batch_size 8 --output report.json"
    assert cli.main([*arguments.split(), *options.split()]) == 0
print(json.dumps({"fid": found["frechet_inception_distance"], "is": found["inception_score_mean"]}))
"""


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="needs torch-fidelity")
def test_a_random_inception_gives_torch_fidelitys_numbers(tmp_path):
    generator = np.random.default_rng(0)
    for folder, count in (("samples", 12), ("real", 14)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            coarse = generator.integers(256, size=(5, 5, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((40, 32), Image.Resampling.BICUBIC)
            picture.save(tmp_path / folder / f"{index:02d}.png")
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = json.loads((tmp_path / "report.json").read_text())["metrics"]
    # The roots of 2,048 eigenvalues, all but 11 of them rounding errors, are part of torch-fidelity's number.
    assert ours["fid"] == pytest.approx(theirs["fid"], rel=1e-4)
    assert ours["is"] == pytest.approx(theirs["is"], rel=1e-5)
