"""The streams against Avalanche's own, on real MNIST and on small files of every format; and their networks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.harness.errors import UsageError
from benchmarks.streams import CLASS, DOMAIN, SCENARIOS, STREAMS, TASK

DATA = Path(__file__).parents[3] / "shared" / "data"
REAL = pytest.mark.skipif(not (DATA / "MNIST" / "raw").is_dir(), reason="needs MNIST in ../shared/data")
LARGE = ("split_tiny_imagenet", "core50")
CASES = [
    pytest.param(name, scenario, marks=[pytest.mark.slow] if name in LARGE else [])
    for name, stream in STREAMS.items()
    if "pretrained" not in name and not name.endswith(("_10", "_50"))  # see test_features
    for scenario in stream.scenarios
]
AVALANCHE = {"split_mnist": "SplitMNIST", "split_fashion_mnist": "SplitFMNIST", "permuted_mnist": "PermutedMNIST",
             "rotated_mnist": "RotatedMNIST"}
REPEATED = ("permuted_digits", "rotated_digits", "permuted_mnist", "rotated_mnist")


def theirs(name, scenario, root, experiences):
    """Avalanche's benchmark."""
    from avalanche.benchmarks import classic

    options = {} if name in REPEATED else {"class_ids_from_zero_in_each_exp": scenario != CLASS}
    make = getattr(classic, AVALANCHE[name])
    return make(experiences, seed=3, dataset_root=root, return_task_id=scenario == TASK, **options)


def assert_equal(ours, other, every):
    """The same examples in the same places: all classes, and the inputs of every so many."""
    for stream in ("train_stream", "test_stream"):
        for experience, expected in zip(getattr(ours, stream), getattr(other, stream)):
            dataset, reference = experience.dataset, expected.dataset
            assert list(dataset.targets) == list(reference.targets)
            assert experience.task_labels == expected.task_labels
            for index in range(0, len(reference), every):
                (x, y, t), (expected_x, expected_y, expected_t) = dataset[index], reference[index]
                assert x.dtype == expected_x.dtype
                assert torch.equal(x, expected_x)
                assert (y, t) == (expected_y, expected_t)


def batch(experience):
    x, y, t = zip(*(experience.dataset[index] for index in range(4)))
    return torch.stack(x), torch.tensor(y), torch.tensor(t)


def test_the_names_of_the_streams_cost_no_import_of_torch_or_avalanche():
    code = "import sys, benchmarks.streams; print([m for m in ('torch', 'avalanche') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(("name", "scenario"), CASES)
def test_every_stream_trains_its_network_in_each_of_its_scenarios(name, scenario, tiny_data, unchecked, learner):
    from benchmarks.training import Steps

    stream = STREAMS[name]
    stream.check(tiny_data, scenario)
    made = stream.make(0, tiny_data, scenario, 2)
    torch.manual_seed(0)
    strategy = learner(stream.model(scenario), Steps(1), train_mb_size=2)
    before = [parameter.clone() for parameter in strategy.model.parameters()]
    for experience in made.train_stream:
        strategy.train(experience)
    assert strategy.clock.train_iterations == 2
    assert not all(torch.equal(a, b) for a, b in zip(before, strategy.model.parameters()))
    labels = [experience.task_labels for experience in made.train_stream]
    assert labels == ([[0], [1]] if scenario == TASK else [[0], [0]])
    x, y, t = batch(made.test_stream[1])
    outputs = strategy.model.eval()(x, t) if scenario == TASK else strategy.model.eval()(x)
    assert outputs.shape == (4, stream.outputs[scenario])
    assert int(y.max()) < stream.outputs[scenario]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", AVALANCHE)
def test_streams_in_memory_hold_what_avalanche_gives_one_by_one(name, scenario, tiny_data):
    if scenario == CLASS and name in REPEATED:
        pytest.skip("Avalanche has no class-incremental one")
    stream = STREAMS[name]
    count = 3 if name in REPEATED else stream.experiences
    assert_equal(stream.make(3, tiny_data, scenario, count), theirs(name, scenario, tiny_data, count), every=1)


@REAL
def test_split_mnist_is_avalanches():
    assert_equal(STREAMS["split_mnist"].make(3, DATA), theirs("split_mnist", CLASS, DATA, 5), every=997)


@REAL
@pytest.mark.slow
@pytest.mark.parametrize("name", ["permuted_mnist", "rotated_mnist"])
def test_moved_pixels_of_mnist_are_avalanches(name):
    assert_equal(STREAMS[name].make(3, DATA, TASK, 2), theirs(name, TASK, DATA, 2), every=97)


@pytest.mark.parametrize("name", REPEATED)
def test_class_incremental_gives_each_repetition_classes_of_its_own(name, tiny_data):
    made = {scenario: STREAMS[name].make(0, tiny_data, scenario, 3) for scenario in SCENARIOS}
    for number in range(3):
        (x, y, _), (same_x, same_y, _) = (batch(made[s].train_stream[number]) for s in (DOMAIN, CLASS))
        assert torch.equal(x, same_x)
        assert torch.equal(same_y, y + 10 * number)
        assert made[CLASS].train_stream[number].classes_in_this_experience == list(range(10 * number, 10 * number + 10))
        assert made[TASK].test_stream[number].classes_in_this_experience == list(range(10))


def test_split_digits_count_their_classes_from_zero_unless_they_are_all_told_apart():
    made = {scenario: STREAMS["split_digits"].make(0, None, scenario) for scenario in SCENARIOS}
    for number in range(5):
        pair = made[CLASS].train_stream[number].classes_in_this_experience
        for scenario in (TASK, DOMAIN):
            same = made[scenario].train_stream[number].dataset
            assert [pair[y] for y in same.targets] == list(made[CLASS].train_stream[number].dataset.targets)


@pytest.mark.parametrize("name", ["split_mnist", "rotated_mnist", "split_cifar10", "rotated_digits"])
def test_fewer_experiences_are_the_first_ones(name, tiny_data, unchecked):
    whole = batch(STREAMS[name].make(0, tiny_data).test_stream[1])
    part = STREAMS[name].make(0, tiny_data, experiences=2)
    assert (len(part.train_stream), len(part.test_stream)) == (2, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, batch(part.test_stream[1])))
    with pytest.raises(UsageError, match=r"experiences; got 11\. Ask for 1 to"):
        STREAMS[name].make(0, tiny_data, experiences=11)


def test_making_a_stream_draws_nothing_and_the_last_one_is_kept(tiny_data):
    stream = STREAMS["split_mnist"]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = stream.make(0, tiny_data)
    assert torch.equal(torch.get_rng_state(), state)
    assert stream.make(0, tiny_data, CLASS) is first
    other = stream.make(1, tiny_data)
    assert [e.classes_in_this_experience for e in other.train_stream] != [
        e.classes_in_this_experience for e in first.train_stream
    ]
    assert stream.make(0, tiny_data) is not first


def test_core50_tests_new_classes_on_their_own_and_new_sessions_on_everything(tiny_data):
    new = STREAMS["core50"].make(13, tiny_data, CLASS)
    assert len(new.train_stream) == len(new.test_stream) == 9
    assert [e.classes_in_this_experience for e in new.test_stream] == [
        e.classes_in_this_experience for e in new.train_stream
    ]
    assert new.train_stream[0].classes_in_this_experience == list(range(3, 13))  # the order 13 mod 10
    assert sum(len(e.dataset) for e in new.test_stream) == 50
    sessions = STREAMS["core50"].make(0, tiny_data, DOMAIN)
    assert [len(e.dataset) for e in sessions.test_stream] == [50] * 8


def test_networks_are_those_of_the_literature():
    """784·400 + 400 + 400·400 + 400 + 400·10 + 10 parameters, say; and heads of two outputs each."""
    count = {name: sum(p.numel() for p in STREAMS[name].model().parameters()) for name in STREAMS}
    assert count["split_mnist"] == 478_410
    assert count["permuted_mnist"] == 784_000 + 1000 + 10**6 + 1000 + 10_010
    assert count["permuted_digits"] == 64 * 100 + 100 + 1010
    many = STREAMS["split_mnist"].model(TASK)
    assert sum(p.numel() for p in many.parameters()) == 478_410 - 4010 + 5 * 802


def test_the_residual_network_is_avalanches_slim_one():
    from avalanche.models import SlimResNet18

    torch.manual_seed(0)
    ours, other = STREAMS["split_cifar100"].model(), SlimResNet18(100)
    for own, parameter in zip(ours.parameters(), other.parameters()):
        own.data.copy_(parameter)
    x = torch.randn(4, 3, 32, 32)
    assert torch.allclose(ours(x), other(x), atol=1e-6)
    assert STREAMS["split_tiny_imagenet"].model()(torch.randn(2, 3, 64, 64)).shape == (2, 200)


def test_tasks_share_the_body_and_have_heads_of_their_own():
    torch.manual_seed(0)
    model = STREAMS["split_digits"].model(TASK)
    x, tasks = torch.randn(4, 64), torch.tensor([0, 3, 3, 4])
    outputs = model(x, tasks)
    heads = [model.heads.classifiers[str(int(task))].classifier for task in tasks]
    assert torch.allclose(outputs, torch.stack([head(model.body(row[None]))[0] for head, row in zip(heads, x)]))
    nn.functional.cross_entropy(outputs, torch.tensor([0, 1, 0, 1])).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.body.parameters())
    assert {name for name, head in model.heads.classifiers.items() if head.classifier.weight.grad is not None} == {
        "0", "3", "4"
    }  # fmt: skip


def test_measuring_a_task_before_it_is_learned_draws_nothing(learner):
    made, stream = STREAMS["split_digits"].make(0, None, TASK), STREAMS["split_digits"]
    strategy = learner(stream.model(TASK))
    state = torch.get_rng_state()
    names = [name for name, _ in strategy.model.named_parameters()]
    for experience in made.test_stream:
        strategy.experience = experience
        strategy.model_adaptation()
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, _ in strategy.model.named_parameters()] == names


def test_a_scenario_that_a_stream_has_not_is_refused_with_those_it_has(tiny_data):
    with pytest.raises(UsageError, match=r"stream 'sine' has no scenario 'class'\. It has: domain\."):
        STREAMS["sine"].check(None, CLASS)
    with pytest.raises(UsageError, match=r"unknown scenario 'clas'; did you mean 'class'\?"):
        STREAMS["split_digits"].make(0, None, "clas")
    with pytest.raises(UsageError, match=r"It has: class, domain\."):
        STREAMS["core50"].model(TASK)


@pytest.mark.parametrize("name", [name for name, stream in STREAMS.items() if stream.source])
def test_what_is_missing_is_named_with_where_to_put_it(name, tmp_path):
    with pytest.raises(UsageError, match=r"is not there, or empty\. Put into") as said:
        STREAMS[name].check(tmp_path)
    source = STREAMS[name].source
    assert str(tmp_path / source.place / source.files[0]) in str(said.value)
    assert all(file in str(said.value) for file in source.files)
    with pytest.raises(UsageError, match="is not there, or empty"):
        STREAMS[name].make(0, tmp_path)  # and nothing is downloaded to a root that was given


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network, and an empty folder of Avalanche's own."""
    import urllib.request
    from urllib.error import URLError

    from avalanche.benchmarks.datasets.dataset_utils import AVALANCHE_CONFIG

    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setitem(AVALANCHE_CONFIG, "dataset_location", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", fail)
    return tmp_path


@pytest.mark.parametrize(("name", "place"), [("split_mnist", "mnist"), ("core50", "core50")])
def test_what_avalanche_downloaded_before_is_found(name, place, offline, tiny_data):
    (offline / place).symlink_to(tiny_data / "core50" if name == "core50" else tiny_data)
    STREAMS[name].check(None)
    assert len(STREAMS[name].make(0, None).train_stream) == STREAMS[name].experiences


@pytest.mark.parametrize("name", ["split_mnist", "split_fashion_mnist", "split_cifar10", "core50"])
def test_without_a_network_the_message_says_what_to_do(name, offline, capsys):
    with pytest.raises(UsageError, match=r"nor downloaded .*no network.* Give --dataset-root DIR, with"):
        STREAMS[name].check(None)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["split_mnist", "permuted_mnist"])
def test_a_damaged_file_is_named_as_such(name, tiny_data, tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for path in (tiny_data / "MNIST" / "raw").iterdir():
        (folder / path.name).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UsageError, match=f"the files in {folder} are damaged, or not all there .*Put there the four"):
        STREAMS[name].make(0, tmp_path)
