"""Each change against paper, over every kind of data set; nothing copied, nothing global touched."""

import copy
import pickle
from itertools import pairwise

import dill
import numpy as np
import pytest
import torch
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training import Naive
from torch import nn
from torch.utils.data import Subset, TensorDataset

from avalanche_curv.streams import (
    GrowingClasses,
    LabelFlip,
    NonStationary,
    PixelPermutation,
    RandomLabels,
    ShuffledLabels,
)
from avalanche_curv.streams._benchmark import Examples

CHANGES = (RandomLabels(), ShuffledLabels(), PixelPermutation(), LabelFlip(), GrowingClasses(1, 1))
COUNT, CLASSES = 120, (2, 3, 5, 7)


def tensors(count=COUNT, shape=(2, 3, 4)):
    """Images whose pixels all differ, [N, 2, 3, 4], and classes that are not 0..K-1, with unequal frequencies."""
    images = torch.arange(count * int(np.prod(shape)), dtype=torch.float32).view(count, *shape)
    targets = torch.tensor(CLASSES)[torch.tensor([0, 0, 1, 1, 2, 3]).repeat(count // 6)]
    return images, targets


class Folder:
    """As torchvision's data sets: `.targets` is a list, and a transform is applied when an example is read."""

    def __init__(self, images, targets, transform=lambda image: image):
        self.images, self.targets, self.transform, self.read = images, targets.tolist(), transform, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.read.append(index)
        return self.transform(self.images[index]), self.targets[index]


KINDS = {
    "tensors": lambda images, targets: TensorDataset(images, targets),
    "examples": Examples,
    "torchvision": Folder,
    "Avalanche": lambda images, targets: as_classification_dataset(Folder(images, targets)),
    "subset": lambda images, targets: Subset(
        TensorDataset(images.flip(0), targets.flip(0)), list(reversed(range(len(images))))
    ),
    "subset of Avalanche": lambda images, targets: Subset(
        as_classification_dataset(Folder(images, targets)), range(len(images))
    ),
}


def of(experience):
    inputs, targets, labels = zip(*experience.dataset)
    assert set(labels) == {0}
    return torch.stack(inputs), torch.tensor(targets)


def everything(scenario):
    return [part for stream in scenario.streams.values() for experience in stream for part in of(experience)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(everything(a), everything(b), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: type(change).__name__)
def test_every_kind_of_data_set_gives_the_same_stream(kind, change):
    images, targets = tensors()
    expected = NonStationary(TensorDataset(images, targets), change, n_experiences=3, seed=1)
    assert equal(NonStationary(KINDS[kind](images, targets), change, n_experiences=3, seed=1), expected)


def test_random_labels_are_uniform_over_the_classes_of_the_data_and_independent_of_all_else():
    """Each of 4 classes has N/4 ± 4 √(3N/16) of N labels; labels of two tasks agree on N/4 ± as much."""
    images, targets = torch.zeros(6000, 1), tensors(6000, (1,))[1]
    stream = NonStationary(TensorDataset(images, targets), RandomLabels(), n_experiences=3, seed=0)
    labels = [of(experience)[1] for experience in stream.train_stream]
    width = 4 * (3 * 6000 / 16) ** 0.5
    for drawn in labels:
        assert sorted(drawn.unique().tolist()) == list(CLASSES)
        assert all(abs(int((drawn == c).sum()) - 1500) < width for c in CLASSES)
    for a, b in [(labels[0], labels[1]), (labels[1], labels[2]), (labels[0], labels[2]), (labels[0], targets)]:
        assert abs(int((a == b).sum()) - 1500) < width


def test_shuffled_labels_keep_the_frequencies_of_the_classes_and_nothing_else():
    images, targets = tensors()
    stream = NonStationary(TensorDataset(images, targets), ShuffledLabels(), n_experiences=3, seed=0)
    labels = [of(experience)[1] for experience in stream.train_stream]
    for drawn in labels:
        assert torch.equal(drawn.sort().values, targets.sort().values)
        assert not torch.equal(drawn, targets)
    assert not torch.equal(labels[0], labels[1])


@pytest.mark.parametrize("change", [RandomLabels(), ShuffledLabels()])
def test_memorised_labels_are_tested_on_the_training_examples(change):
    stream = NonStationary(TensorDataset(*tensors()), change, n_experiences=2, seed=0)
    for train, test in zip(stream.train_stream, stream.test_stream, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(of(train), of(test), strict=True))


def test_pixels_are_moved_by_one_order_for_all_images_and_channels_of_a_task():
    images, targets = tensors()
    test = TensorDataset(images[:30] + 0.5, targets[:30])
    stream = NonStationary(TensorDataset(images, targets), PixelPermutation(), test=test, n_experiences=3, seed=0)
    orders = []
    for train, tested in zip(stream.train_stream, stream.test_stream, strict=True):
        moved, labels = of(train)
        order = moved[0, 0].flatten().long()  # image 0, channel 0 holds 0 .. 11: the place that each pixel comes from
        assert torch.equal(moved, images.flatten(2)[..., order].view_as(images))
        assert torch.equal(of(tested)[0], moved[:30] + 0.5)
        assert torch.equal(labels, targets)
        orders.append(order.tolist())
    assert orders[0] == list(range(12))
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_the_pixels_of_vectors_and_of_images_without_channels_move_alike(shape):
    images, targets = tensors(shape=shape)
    flat = TensorDataset(images.flatten(1), targets)
    expected = NonStationary(flat, PixelPermutation(), n_experiences=2, seed=0)
    stream = NonStationary(TensorDataset(images, targets), PixelPermutation(), n_experiences=2, seed=0)
    assert torch.equal(of(stream.train_stream[1])[0].flatten(1), of(expected.train_stream[1])[0])


def test_a_label_flip_is_one_permutation_of_the_classes_in_training_and_testing():
    images, targets = tensors()
    test = TensorDataset(images[:12], targets[:12])
    stream = NonStationary(TensorDataset(images, targets), LabelFlip(), test=test, n_experiences=6, seed=0)
    maps = []
    for train, tested in zip(stream.train_stream, stream.test_stream, strict=True):
        pairs = {*zip(targets.tolist(), of(train)[1].tolist(), strict=True)}
        assert sorted(old for old, _ in pairs) == sorted(new for _, new in pairs) == list(CLASSES)
        assert {*zip(targets[:12].tolist(), of(tested)[1].tolist(), strict=True)} == pairs
        maps.append(tuple(sorted(pairs)))
    assert all(old == new for old, new in maps[0])
    assert len(set(maps)) > 3


@pytest.mark.parametrize(("change", "counts"), [(GrowingClasses(1, 1), [1, 2, 3, 4]), (GrowingClasses(3, 5), [3, 4])])
def test_classes_grow_to_all_of_them_and_none_is_lost_again(change, counts):
    images, targets = tensors()
    test = TensorDataset(images[:12], targets[:12])
    stream = NonStationary(TensorDataset(images, targets), change, test=test, n_experiences=len(counts), seed=0)
    shown = []
    for train, tested in zip(stream.train_stream, stream.test_stream, strict=True):
        inputs, labels = of(train)
        shown.append(set(labels.tolist()))
        kept = torch.tensor([label in shown[-1] for label in targets.tolist()])
        assert torch.equal(inputs, images[kept])
        assert torch.equal(labels, targets[kept])
        assert set(of(tested)[1].tolist()) == shown[-1]
        assert train.classes_in_this_experience == sorted(shown[-1])
    assert [len(classes) for classes in shown] == counts
    assert all(a < b for a, b in pairwise(shown))


def test_the_seed_draws_the_order_in_which_classes_come():
    first = {
        NonStationary(TensorDataset(*tensors()), GrowingClasses(1, 1), n_experiences=1, seed=seed)
        .train_stream[0].classes_in_this_experience[0]
        for seed in range(20)
    }
    assert first == set(CLASSES)


@pytest.mark.usefixtures("random_states")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: type(change).__name__)
def test_a_seed_fixes_the_stream_whose_beginning_does_not_depend_on_its_length(change):
    source = TensorDataset(*tensors())
    short, long = (NonStationary(source, change, n_experiences=n, seed=3) for n in (2, 4))
    NonStationary(source, change, n_experiences=1)
    backwards = [of(experience) for experience in reversed(long.train_stream)]  # nor on the order of reading
    for a, b in zip(short.train_stream, reversed(backwards)):
        assert all(torch.equal(x, y) for x, y in zip(of(a), b, strict=True))
    others = [NonStationary(source, change, n_experiences=2, seed=seed) for seed in (4, 5, 6, 7)]
    assert not all(equal(short, other) for other in others)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: type(change).__name__)
def test_no_image_is_copied(change):
    """All tasks, training and testing, see the storage of the source; moved pixels alone are made when asked for."""
    images, targets = tensors()
    start = images.untyped_storage().data_ptr()
    stream = NonStationary(TensorDataset(images, targets), change, n_experiences=3, seed=0)
    shared = [experience.dataset[0][0].untyped_storage().data_ptr() for experience in stream.train_stream]
    moved = isinstance(change, PixelPermutation)
    assert [place == start for place in shared] == ([True, False, False] if moved else [True] * 3)
    assert len(pickle.dumps(stream)) < images.nbytes + 25_000  # 2 × 3 tasks of 120 targets, and Avalanche's lists


@pytest.mark.parametrize(("classes", "size"), [(100, 1), (200, 2), (40_000, 4)])
def test_a_task_holds_its_labels_once_in_the_smallest_integers(classes, size):
    targets = torch.arange(50_000) % classes
    stream = NonStationary(TensorDataset(torch.zeros(50_000, 1), targets), PixelPermutation(), n_experiences=1, seed=0)
    alone = len(pickle.dumps(stream)) - 4 * 50_000
    assert alone < 2 * size * 50_000 + (2 * 20 * classes) + 25_000  # train and test, and Avalanche's sets of classes
    assert [stream.train_stream[0].dataset[place][1] for place in (0, 7, 49_999)] == targets[[0, 7, -1]].tolist()


def test_target_transforms_do_not_change_the_classes_of_targets():
    class Source(Folder):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], 99  # as a target_transform would

    stream = NonStationary(Source(*tensors()), PixelPermutation(), n_experiences=1, seed=0)
    assert torch.equal(of(stream.train_stream[0])[1], tensors()[1])


def test_images_are_read_when_asked_for_and_by_the_transforms_of_the_source():
    images, targets = tensors()
    source = Folder(images, targets, transform=lambda image: -image)
    stream = NonStationary(source, ShuffledLabels(), n_experiences=3, seed=0)
    assert source.read == []
    inputs, *_ = stream.train_stream[2].dataset[7]
    assert torch.equal(inputs, -images[7])
    assert source.read == [7]


def test_training_transforms_are_left_out_where_training_examples_are_tested_on():
    images, targets = tensors()
    source = as_classification_dataset(
        Folder(images, targets), transform_groups={"train": (lambda x: x + 1, None), "eval": (lambda x: x, None)}
    )
    stream = NonStationary(source, RandomLabels(), n_experiences=1, seed=0)
    assert torch.equal(of(stream.train_stream[0])[0], images + 1)
    assert torch.equal(of(stream.test_stream[0])[0], images)


@pytest.mark.parametrize("library", [pickle, dill])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: type(change).__name__)
def test_streams_survive_pickling_and_copying(library, change):
    stream = NonStationary(TensorDataset(*tensors()), change, n_experiences=2, seed=0)
    assert equal(library.loads(library.dumps(stream)), stream)
    assert equal(copy.deepcopy(stream), stream)


def test_experiences_know_their_classes_as_sorted_lists_and_a_strategy_learns_them():
    images, targets = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6).repeat(10)
    stream = NonStationary(TensorDataset(images, targets), GrowingClasses(4, 2), n_experiences=2, seed=0)
    first, second = stream.train_stream
    assert second.classes_in_this_experience == list(range(6))
    assert first.classes_in_this_experience == second.previous_classes == sorted(first.classes_in_this_experience)
    assert stream.n_classes == 6
    model = nn.Linear(4, 6)
    learner = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), criterion=nn.CrossEntropyLoss(),
        train_mb_size=7, evaluator=None,
    )
    for experience in stream.train_stream:
        learner.train(experience)
    learner.eval(stream.test_stream)


@pytest.mark.parametrize(
    ("make", "error", "expected"),
    [
        (lambda d: NonStationary(d, RandomLabels(), n_experiences=0), ValueError, "got 0"),
        (lambda d: NonStationary(d, RandomLabels(), n_experiences=2.5), ValueError, "whole n_experiences.* got 2.5"),
        (lambda d: NonStationary(d, RandomLabels(), n_experiences=1, seed=-1), ValueError, "at least 0.* got -1"),
        (lambda d: NonStationary(d, RandomLabels(), n_experiences=1, seed="0"), ValueError, "at least 0.* got '0'"),
        (lambda d: NonStationary(d, RandomLabels, n_experiences=1), TypeError, r"Did you mean RandomLabels\(\)"),
        (lambda d: NonStationary(d, "labels", n_experiences=1), TypeError, "needs a change; got 'labels'"),
        (lambda d: NonStationary(d, RandomLabels(), test=d, n_experiences=1), ValueError, "Leave test out"),
        (lambda d: NonStationary(d, GrowingClasses(1, 2), n_experiences=4), ValueError, "Ask for at most 3"),
        (lambda d: NonStationary([(torch.zeros(1), 0)], LabelFlip(), n_experiences=1), TypeError, "list has no"),
        (lambda d: NonStationary(TensorDataset(torch.zeros(2)), LabelFlip(), n_experiences=1), TypeError, "no targets"),
        (
            lambda d: NonStationary(TensorDataset(torch.zeros(2), torch.zeros(2)), LabelFlip(), n_experiences=1),
            TypeError, r"whole number for each example.*float32",
        ),
        (
            lambda d: NonStationary(
                d, LabelFlip(), test=TensorDataset(torch.zeros(1), torch.tensor([9])), n_experiences=1
            ),
            ValueError, r"classes \[9\] that no training example has",
        ),
        (
            lambda d: NonStationary(Folder(["jpeg"], torch.tensor([0])), PixelPermutation(), n_experiences=2)
            .train_stream[1].dataset[0],
            TypeError, r"holds a str.*ToTensor",
        ),
    ],
)
def test_wrong_arguments_name_the_remedy(make, error, expected):
    with pytest.raises(error, match=expected):
        make(TensorDataset(*tensors()))
