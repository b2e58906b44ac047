"""A model saved is the model loaded; what goes wrong is said, and destroys nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import m2ae.models.pretrained
from m2ae import M2AE, M2AEConfig


@pytest.fixture
def folder(small, tmp_path):
    with torch.no_grad():
        small.target_encoder.encoder.proj.bias.add_(1)
    small.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_is_saved_is_loaded(small, folder, make_inputs):
    loaded = M2AE.from_pretrained(folder)
    assert not loaded.training
    assert loaded.config == small.config
    for name, value in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    inputs = make_inputs()
    assert torch.equal(loaded.encode(inputs).joint, small.eval().encode(inputs).joint)
    loaded.target_encoder.update(0.0)
    assert torch.equal(loaded.target_encoder.encoder.proj.bias, small.image_encoder.proj.bias)


def test_saving_over_an_older_model_replaces_it(small, folder):
    with torch.no_grad():
        small.image_encoder.proj.bias.fill_(7)
    small.save_pretrained(folder)
    assert (M2AE.from_pretrained(folder).image_encoder.proj.bias == 7).all()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_cut_file_is_an_error(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"from_pretrained: expected .* in .*{name}, got"):
        M2AE.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_an_error(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        M2AE.from_pretrained(folder)


def test_tensors_that_do_not_fit_are_listed(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["fusion.weigth"] = tensors.pop("fusion.weight")
    tensors["fusion.bias"] = torch.zeros(21)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        M2AE.from_pretrained(folder)
    for fault in (
        "fusion.weight is missing",
        "fusion.weigth is unknown",
        "fusion.bias is [21] and not [20]",
    ):
        assert fault in str(error.value)


def test_a_config_with_an_unknown_key_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["image"]["patchsize"] = config["image"].pop("patch_size")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"M2AEConfig.image: .* 'patchsize'; did you mean 'patch_size'"
    ):
        M2AE.from_pretrained(folder)


def test_a_save_that_fails_leaves_the_old_model(small, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(m2ae.models.pretrained, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        small.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_unwritable_folder_leaves_the_old_model(small, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    # Permissions do not bind the root user, so the refusal comes from the call that meets it.
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(PermissionError):
        small.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_in_place_of_the_folder_is_an_error(small, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError):
        small.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


@pytest.mark.parametrize("preset", ["m2ae_spec", "m2ae_tiny"])
def test_presets_are_saved_whole(preset, tmp_path):
    config = M2AEConfig.preset(preset)
    assert M2AEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
