"""Standardization: what it makes of training items, and that the file gives the same numbers."""

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from m2ae.modalities.features import Standardization


def test_training_items_are_centered_with_root_mean_square_1_and_keep_their_angles():
    features = {"a": 5 + 3 * torch.randn(50, 4), "b": 0.01 * torch.randn(50, 7)}
    z = Standardization.measure(features)(features)
    for name, rows in z.items():
        assert_close(rows.mean(0), torch.zeros(rows.shape[1]), rtol=0, atol=1e-5)  # 50 roundings
        assert_close(rows.square().mean(), torch.tensor(1.0))
        centered = features[name] - features[name].mean(0)
        cosines = [torch.nn.functional.normalize(x, dim=1) for x in (rows, centered)]
        assert_close(cosines[0] @ cosines[0].T, cosines[1] @ cosines[1].T)


def test_other_items_get_the_training_items_numbers():
    standardize = Standardization.measure({"a": torch.tensor([[0.0], [2.0]])})  # mean 1, scale 1
    assert_close(standardize({"a": torch.tensor([[4.0]])})["a"], torch.tensor([[3.0]]))


def test_what_is_saved_is_loaded(tmp_path):
    features = {"a": torch.randn(9, 4), "b.c": torch.randn(9, 2)}
    standardize = Standardization.measure(features)
    standardize.save(tmp_path)
    loaded = Standardization.load(tmp_path)
    for name, rows in standardize(features).items():
        assert torch.equal(loaded(features)[name], rows)
    with pytest.raises(FileNotFoundError):
        Standardization.load(tmp_path / "nowhere")


def test_a_damaged_file_and_another_one_are_refused(tmp_path):
    Standardization.measure({"a": torch.randn(9, 4)}).save(tmp_path)
    path = tmp_path / "standardization.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="expected complete tensors"):
        Standardization.load(tmp_path)
    for tensors in ({"mean.a": torch.ones(4)}, {"weight": torch.ones(4)}):
        save_file(tensors, path)
        with pytest.raises(ValueError, match="expected a mean and a scale for each modality, got"):
            Standardization.load(tmp_path)


def test_features_that_never_vary_are_refused():
    # 0.1 is no binary number: the mean of many is not exactly it, and the scale not exactly 0.
    constant = {"a": torch.full((7, 3), 0.1)}
    with pytest.raises(ValueError, match="expected a features that vary, got one for all items"):
        Standardization.measure(constant)
