"""The streams that experiments train on, by name, with the networks and the recipes of the literature.

A stream has scenarios (`TASK`, `DOMAIN`, `CLASS`), the first of them its default. Splits, class orders, permutations
and angles are Avalanche's for the same seed. Importing this imports neither torch nor Avalanche.

References: Kirkpatrick et al. 2017 (EWC); Lopez-Paz & Ranzato 2017 (GEM); Hsu et al. 2018 (Re-evaluating continual
learning scenarios); van de Ven & Tolias 2019 (Three scenarios for continual learning); Buzzega et al. 2020 (DER);
van de Ven, Tuytelaars & Tolias 2022 (Three types of incremental learning); Mai et al. 2022 (Online continual learning
in image classification).
"""

from dataclasses import replace

from benchmarks.data import SOURCES
from benchmarks.streams.features import FeatureMap, Features, Head, Pretrained, RandomReLU, classes_of
from benchmarks.streams.scenario import CLASS, DOMAIN, SCENARIOS, TASK
from benchmarks.streams.stream import Mlp, Recipe, ResNet18, Stream

__all__ = ["CLASS", "DOMAIN", "SCENARIOS", "STREAMS", "TASK", "Recipe", "Stream"]

SMALL = Recipe(60, 64, 3e-3, memory=0.1, source="chosen here, so that a run takes seconds")
TWO_THOUSAND = Recipe(2_000, 128, 1e-3, memory=2_000 / 60_000, source="van de Ven & Tolias 2019, split MNIST")
FIVE_THOUSAND = Recipe(5_000, 256, 1e-4, memory=2_000 / 600_000, source="van de Ven & Tolias 2019, permuted MNIST")
CIFAR = Recipe(5_000, 256, 1e-4, memory=2_000 / 50_000, source="van de Ven, Tuytelaars & Tolias 2022, split CIFAR-100")
HUNDRED_EPOCHS = Recipe(31_250, 32, 1e-3, memory=5_120 / 100_000, source="Buzzega et al. 2020; they use SGD at 0.03")
ONE_PASS = Recipe(1_500, 10, 1e-3, memory=2_000 / 120_000, source="Mai et al. 2022, about a pass; they use SGD at 0.1")
HEADS = Recipe(100, 64, 1e-3, memory=TWO_THOUSAND.memory, source="chosen here: five passes over 600 images a class")
ROTATED = replace(TWO_THOUSAND, memory=FIVE_THOUSAND.memory, source="van de Ven & Tolias 2019: split MNIST's steps")

SEEN: dict[str, FeatureMap] = {"pretrained": Pretrained(), "random": RandomReLU()}
"""By the end of a stream's name: what stands between its images and the head that is trained."""
DIGITS, PLANE = Mlp(64, (100,)), Mlp(2, (100,))
HSU = Mlp(784, (400, 400))  # Hsu et al. 2018, van de Ven & Tolias 2019
WIDE = Mlp(784, (1000, 1000))  # van de Ven & Tolias 2019
SLIM, FULL = ResNet18(20), ResNet18(64)  # Lopez-Paz & Ranzato 2017; Buzzega et al. 2020


def _split(classes: int, experiences: int) -> dict[str, int]:
    """The outputs of a head where each experience has classes of its own."""
    return {CLASS: classes, DOMAIN: classes // experiences, TASK: classes // experiences}


def _repeated(classes: int, experiences: int) -> dict[str, int]:
    """The outputs of a head where all experiences have the same classes, told apart by what the inputs look like."""
    return {DOMAIN: classes, TASK: classes, CLASS: classes * experiences}


def _heads(name: str, images: str, seen: str, experiences: int = 5, **counts: int) -> Stream:
    """A split of images of which only a linear head is trained, on features. Of ten experiences each is a class, and
    none is told from itself; of more, each has two."""
    end = f"_{experiences}" if experiences != 5 else "_all" if counts else ""
    features, count = Features(images, SEEN[seen], **counts), classes_of(10, experiences)
    outputs = {CLASS: 10} if count == 1 else {CLASS: 10, DOMAIN: count, TASK: count}
    return Stream(f"{name}_{seen}{end}", experiences, outputs, Head(features.map.width), HEADS, seen=features)


MNIST = SOURCES["mnist"]
_ALL = (
    Stream("permuted_digits", 5, _repeated(10, 5), DIGITS, SMALL),
    Stream("rotated_digits", 5, _repeated(10, 5), DIGITS, SMALL),
    Stream("split_digits", 5, _split(10, 5), DIGITS, SMALL),
    Stream("sine", 9, {DOMAIN: 2}, PLANE, replace(SMALL, steps=100)),
    Stream("split_mnist", 5, _split(10, 5), HSU, TWO_THOUSAND, MNIST),
    Stream("permuted_mnist", 10, _repeated(10, 10), WIDE, FIVE_THOUSAND, MNIST),
    Stream("rotated_mnist", 10, _repeated(10, 10), HSU, ROTATED, MNIST),
    Stream("split_fashion_mnist", 5, _split(10, 5), HSU, TWO_THOUSAND, SOURCES["fashion"]),
    Stream("split_cifar10", 5, _split(10, 5), SLIM, CIFAR, SOURCES["cifar10"]),
    Stream("split_cifar100", 10, _split(100, 10), SLIM, CIFAR, SOURCES["cifar100"]),
    Stream("split_tiny_imagenet", 10, _split(200, 10), FULL, HUNDRED_EPOCHS, SOURCES["tiny_imagenet"]),
    Stream("core50", 9, {CLASS: 50, DOMAIN: 50}, SLIM, ONE_PASS, SOURCES["core50"], {DOMAIN: 8}),
    *(
        _heads(name, images, seen, experiences)
        for name, images in (("split_digits", "digits"), ("split_mnist", "mnist"), ("split_fashion_mnist", "fashion"))
        for seen in SEEN
        for experiences in (5, 10, 50)
    ),
    _heads("split_mnist", "mnist", "pretrained", train=6_000, test=1_000),
    _heads("split_fashion_mnist", "fashion", "pretrained", train=6_000, test=1_000),
)
STREAMS = {stream.name: stream for stream in _ALL}
