import pickle
import sys

import dill
import pytest
import torch
from avalanche.models import MTSimpleMLP
from avalanche.training import EWC, Cumulative, LwF, Replay
from sklearn.datasets import load_digits
from torch import nn

from avalanche_curv.streams import PermutedDigits, RotatedDigits, SplitDigits

STREAMS = (SplitDigits, PermutedDigits, RotatedDigits)


def as_rows(inputs, targets):
    return sorted([*x, y] for x, y in zip(inputs.tolist(), targets.tolist(), strict=True))


def test_an_unsplit_stream_holds_every_image_of_the_source_once(tensors):
    benchmark = SplitDigits(1, seed=0)
    parts = [tensors(stream[0]) for stream in (benchmark.train_stream, benchmark.test_stream)]
    inputs, targets = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    pixels, digits = load_digits(return_X_y=True)
    assert inputs.dtype == torch.float32
    assert as_rows(inputs * 16, targets) == as_rows(torch.from_numpy(pixels), torch.from_numpy(digits))


@pytest.mark.parametrize("stream", STREAMS)
def test_a_fifth_of_every_digit_is_for_testing(stream, tensors):
    benchmark = stream(1, seed=0)
    counts = torch.bincount(torch.from_numpy(load_digits().target))
    test = torch.bincount(tensors(benchmark.test_stream[0])[1])
    train = torch.bincount(tensors(benchmark.train_stream[0])[1])
    assert torch.equal(train + test, counts)
    assert ((test - counts / 5).abs() <= 0.5).all()


def test_one_seed_gives_the_same_split_in_every_stream(tensors):
    first = [tensors(stream(1, seed=7).test_stream[0])[0] for stream in STREAMS]
    torch.testing.assert_close(first[1], first[0])
    torch.testing.assert_close(first[2], first[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_experiences", [2, 5, 10])
def test_every_digit_is_in_exactly_one_experience_of_a_split_stream(n_experiences, tensors):
    benchmark = SplitDigits(n_experiences, seed=0)
    for stream in benchmark.streams.values():
        classes = [sorted(tensors(experience)[1].unique().tolist()) for experience in stream]
        assert sorted(digit for group in classes for digit in group) == list(range(10))
        assert {len(group) for group in classes} == {10 // n_experiences}
        assert [experience.classes_in_this_experience for experience in stream] == classes
    seen = benchmark.train_stream[1]
    assert set(seen.classes_seen_so_far) == set(seen.previous_classes) | set(seen.classes_in_this_experience)


def test_the_seed_decides_the_order_of_the_digits():
    orders = {str([e.classes_in_this_experience for e in SplitDigits(10, seed=s).train_stream]) for s in range(5)}
    assert len(orders) == 5


def test_task_labels_count_experiences_on_request_and_are_zero_otherwise(tensors):
    for wanted, labels in ((True, [0, 1, 2, 3, 4]), (False, [0] * 5)):
        for experience, label in zip(SplitDigits(5, task_labels=wanted, seed=0).train_stream, labels, strict=True):
            assert experience.task_labels == [label]
            assert (tensors(experience)[2] == label).all()


def test_a_permuted_image_unpermutes_to_the_original_by_one_permutation_for_all_images(tensors):
    benchmark = PermutedDigits(3, seed=0)
    original, _, _ = tensors(SplitDigits(1, seed=0).train_stream[0])
    assert torch.equal(tensors(benchmark.train_stream[0])[0], original)
    for train, test in zip(list(benchmark.train_stream)[1:], list(benchmark.test_stream)[1:], strict=True):
        permuted, first = tensors(train)[0], tensors(benchmark.train_stream[0])[0]
        source = _source_of_each_pixel(permuted, first)
        restored = torch.empty_like(test.dataset[0][0])
        restored[source] = test.dataset[0][0]
        assert torch.equal(restored, benchmark.test_stream[0].dataset[0][0])
        assert not torch.equal(permuted, first)


def _source_of_each_pixel(permuted, original):
    # columns that are equal over all training images (the blank ones) are interchangeable: match them in order
    free, source = list(range(64)), []
    for column in permuted.T:
        found = next(j for j in free if torch.equal(original[:, j], column))
        free.remove(found)
        source.append(found)
    return torch.tensor(source)


def test_a_longer_permuted_stream_begins_with_the_shorter(tensors):
    short, long = PermutedDigits(2, seed=0), PermutedDigits(4, seed=0)
    for a, b in zip(short.train_stream, list(long.train_stream)[:2], strict=True):
        assert torch.equal(tensors(a)[0], tensors(b)[0])


@pytest.mark.parametrize(
    ("degrees", "turned"),
    [
        (0, lambda images: images),
        (90, lambda images: images.rot90(1, (1, 2))),
        (180, lambda images: images.flip(1, 2)),
        (-90, lambda images: images.rot90(-1, (1, 2))),
    ],
)
def test_a_rotation_by_right_angles_moves_pixels_only(degrees, turned, tensors):
    original = tensors(SplitDigits(1, seed=0).test_stream[0])[0].view(-1, 8, 8)
    rotated = tensors(RotatedDigits(1, rotations=[degrees], seed=0).test_stream[0])[0].view(-1, 8, 8)
    torch.testing.assert_close(rotated, turned(original), atol=1e-5, rtol=0)


def test_a_rotation_by_any_angle_stays_between_blank_and_black(tensors):
    for stream in RotatedDigits(3, seed=0).streams.values():
        for experience in stream:
            inputs = tensors(experience)[0]
            assert inputs.min() >= 0
            assert inputs.max() <= 1 + 1e-6


def test_default_angles_share_half_a_turn_equally(equal):
    assert equal(RotatedDigits(4, seed=0), RotatedDigits(4, rotations=[0, 45, 90, 135], seed=0))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.usefixtures("random_states")
def test_a_seed_fixes_the_stream_and_touches_no_global_state(stream, tensors, equal):
    first = stream(2, seed=1)
    stream(2)
    assert equal(first, stream(2, seed=1))
    assert not torch.equal(tensors(first.test_stream[0])[0], tensors(stream(2, seed=2).test_stream[0])[0])


@pytest.mark.parametrize("library", [pickle, dill])
def test_streams_survive_pickling(library, equal):
    benchmark = PermutedDigits(2, seed=0)
    packed = library.dumps(benchmark)
    assert equal(library.loads(packed), benchmark)
    assert len(packed) < 2_000_000  # 2 × 1797 × (64 × 4 + 8 bytes), and the lists of targets


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SplitDigits(3), "1, 2, 5 or 10"),
        (lambda: SplitDigits(0), "got 0"),
        (lambda: PermutedDigits(-1), "got -1"),
        (lambda: RotatedDigits(0), "got 0"),
        (lambda: RotatedDigits(3, rotations=[0, 10]), "each of 3 experiences; got 2"),
    ],
)
def test_wrong_arguments_name_the_remedy(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()


@pytest.mark.parametrize("stream", STREAMS)
def test_without_scikit_learn_the_remedy_comes_before_anything_else(stream, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "avalanche-curv\[benchmarks\]"'):
        stream(0)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (EWC, {"ewc_lambda": 1.0}),
        (LwF, {"alpha": 1.0, "temperature": 2.0}),
        (Replay, {"mem_size": 50}),
        (Cumulative, {}),
    ],
)
def test_a_multi_head_learns_split_digits_with_task_labels(strategy, options):
    benchmark = SplitDigits(5, task_labels=True, seed=0)
    model = MTSimpleMLP(input_size=64, hidden_size=16)
    learner = strategy(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=64,
        eval_mb_size=64,
        evaluator=None,
        **options,
    )
    for experience in list(benchmark.train_stream)[:2]:
        learner.train(experience)
    learner.eval(list(benchmark.test_stream)[:2])
    assert model.known_train_tasks_labels == {0, 1}
