"""The folder as it is to be on the Hub, without a network."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from tiny_models import make_pipeline

from hfdiff import AnnealedLangevinScheduler, DDPMScheduler, NCSNModel, NCSNPipeline, NCSNv2Model
from hfdiff.hub.folder import export
from hfdiff.pipelines.portable import use_imported

OWN_CARD = """---
license: mit
datasets: [someone/digits]
---
# My digits

    pipe = ClassifierGuidedPipeline.from_pretrained("runs/guided")

An accuracy of 1.0 ± 0.5.
"""


def make_ncsn(kind: type) -> NCSNPipeline:
    scheduler = AnnealedLangevinScheduler(4, 0.01, 1.0, steps_per_level=1)
    pipe = NCSNPipeline(kind(8, 1, 4, num_levels=4, sigma_max=1.0), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "guided"
    make_pipeline().save_pretrained(folder)
    return folder


def test_files_of_one_name_are_one_file(guided: Path, tmp_path: Path) -> None:
    """diffusers copies the code of all folders it opens into one."""
    for kind in (NCSNModel, NCSNv2Model):
        make_ncsn(kind).save_pretrained(tmp_path / kind.__name__)
    paths = [path for folder in (guided, tmp_path) for path in folder.rglob("*.py") if path.name != "pipeline.py"]
    assert len({path.name for path in paths}) == len({path.read_text() for path in paths}) > 10


def test_the_folders_code_is_replaced_by_the_packages() -> None:
    index = {"_class_name": ["pipeline", "NCSNPipeline"], "unet": ["ncsnv2", "NCSNv2Model"], "vae": [None, None]}
    other = {"classifier": ["own_model", "OwnModel"], "scheduler": ["diffusers", "DDIMScheduler"], "scale": 1.0}
    assert use_imported({**index, **other}) == {
        "_class_name": "NCSNPipeline",
        "unet": ["hfdiff.models.ncsnv2", "NCSNv2Model"],
        "vae": [None, None],
        **other,
    }


def test_a_card_is_kept_and_completed(guided: Path, tmp_path: Path) -> None:
    (guided / "README.md").write_text(OWN_CARD)
    for _ in range(2):  # a second time adds nothing
        export(guided, tmp_path / "out", repo_id="user/digits", license="apache-2.0", picture=False)
        card = ModelCard.load(tmp_path / "out" / "README.md")
        (guided / "README.md").write_text(card.content)
        (tmp_path / "out").rename(tmp_path / "before")
        assert "An accuracy of 1.0 ± 0.5." in card.text
        assert card.text.count("from_pretrained(") == 2
        assert card.text.count('ClassifierGuidedPipeline.from_pretrained("user/digits")') == 1
        assert card.data.to_dict() == {
            "datasets": ["someone/digits"],
            "library_name": "hfdiff",
            "license": "mit",
            "metrics": ["accuracy"],
            "pipeline_tag": "unconditional-image-generation",
            "tags": ["diffusion", "diffusers:ClassifierGuidedPipeline"],
        }
        (tmp_path / "before").rename(tmp_path / f"{len(list(tmp_path.iterdir()))} done")


def test_a_new_card_names_parts_and_shows_a_picture(tmp_path: Path) -> None:
    export(make_ncsn(NCSNv2Model), tmp_path / "out", repo_id="user/score")
    text = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "# NCSNPipeline",
        "- `unet`: NCSNv2Model",
        "![Samples](samples.png)",
        "None were measured",
        "## Limits",
    ):
        assert words in text
    assert (tmp_path / "out" / "samples.png").stat().st_size > 0
    assert not list(tmp_path.glob("*.partial*"))


def test_a_pipeline_of_diffusers_carries_the_code_of_its_scheduler(tmp_path: Path) -> None:
    torch.manual_seed(0)
    diffusers.DDPMPipeline(make_pipeline().unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    (tmp_path / "ddpm" / "README.md").write_text('# A\nimport hfdiff\nDDPMPipeline.from_pretrained("x/ddpm")\n')
    export(tmp_path / "ddpm", tmp_path / "out", repo_id="user/ddpm")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["scheduler"] == ["scheduling_ddpm", "DDPMScheduler"]
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("user/ddpm", trust_remote_code=True)' in card
    assert "import hfdiff" not in card  # its code comes with it


def test_checkpoints_and_pickles_stay_out(guided: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-1/model.safetensors", "unet/old.bin"):
        (guided / name).parent.mkdir(exist_ok=True)
        (guided / name).write_bytes(b"")
    export(guided, tmp_path / "out", picture=False)
    assert not [*(tmp_path / "out").rglob("*.bin"), *(tmp_path / "out").glob("checkpoint*")]


def test_what_cannot_be_published_is_refused(guided: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="`destination` must be a new"):
        export(guided, tmp_path / "full")
    with pytest.raises(ValueError, match="`source` must be a pipeline"):
        export(tmp_path / "full", tmp_path / "out")
    (tmp_path / "full" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="as safetensors"):
        export(tmp_path / "full", tmp_path / "out")
    (tmp_path / "full" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="a class of hfdiff or diffusers"):
        export(tmp_path / "full", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
