"""The loop against Avalanche's, the data as files hold them, the grid, the report; and, slowly, the claim itself."""

import pickle
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from avalanche.training import Naive
from torch import nn

from avalanche_curv import EmpiricalRisk
from avalanche_curv.plugins.mitigator import MitigatorPlugin
from avalanche_curv.streams import NonStationary
from avalanche_curv.streams._benchmark import Examples, benchmark
from benchmarks.data import read
from benchmarks.experiments.plasticity.collapse import backward, forward, pooled
from benchmarks.experiments.plasticity.experiment import PARTS, PlasticityOptions, experiment, setting_for
from benchmarks.experiments.plasticity.learner import MADE, Learner, Tasks, curvature, fit, summary
from benchmarks.experiments.plasticity.report import against, report
from benchmarks.experiments.plasticity.settings import CHANGES, PRESETS, Mlp, ResNet18, Setting, VitTiny
from benchmarks.harness import Context, Results, UsageError
from benchmarks.harness.experiment import describe, grid

DATA = Path(__file__).parents[3] / "shared" / "data"
TINY = Setting("digits", count=48, batch=20, epochs=2, tasks=3, network=Mlp(8, 2))


@pytest.fixture(scope="module")
def configs():
    """Every configuration of the grid by its label."""
    return {config.label: config for config in experiment.configs(PlasticityOptions())}


def run(config, folder, setting=TINY, seed=0, root=None):
    """The records of a run, values by metric and step."""
    kept = replace(setting, network=replace(setting.network, layer_norm=config.setting.network.layer_norm))
    config = replace(config, setting=kept if isinstance(config.setting.network, Mlp) else setting)
    records = [*experiment.run(config, seed, Context(seed, True, root, folder))]
    found = {}
    for record in records:
        found.setdefault(record["metric"], {})[record.get("step")] = record["value"]
    return found


METHODS = (
    "none", "SpectralReg 0.01", "L2 0.01", "L2 init 0.01", "Wasserstein 0.01", "streaming EWC 0.01", "Parseval 0.01",
    "shrink & perturb 0.01", "shrink & perturb 0.5 after each task", "ReDO 0.1", "SNR 0.1", "FIRE 0.5", "AdamO 1",
    "CReLU", "none, LayerNorm",
)


@pytest.mark.parametrize("label", METHODS)
def test_the_loop_is_that_of_avalanche_with_the_plugin_bit_for_bit(configs, label):
    """On the same batches in the same order: three tasks, a ragged last batch, Adam's moments kept."""


    config = configs[label]
    network = Mlp(8, 2, layer_norm=config.setting.network.layer_norm)
    config = replace(config, setting=replace(TINY, network=network))
    tasks = [Tasks(config.setting, 0, None).of(number)[0] for number in range(3)]
    learner = Learner(config, 0, tasks[0])

    def begin(mitigator, number):
        config.method.begin_task(mitigator, config.setting, number, config.setting.task_steps)

    for number, task in enumerate(tasks):
        begin(learner.mitigator, number)
        for _ in range(config.setting.epochs):
            fit(learner.model, learner.optimizer, task.batches(torch.arange(len(task)), config.setting.batch))
        if number < 2:  # between tasks
            learner.end_task()

    torch.manual_seed(0)
    model = network.build((1, 8, 8), 10, config.method.activation)
    mitigator = config.method.mitigator(config.setting, 0)
    pairs = [Examples(*task.batch(torch.arange(len(task)))) for task in tasks]
    strategy = Naive(
        model=model, optimizer=torch.optim.Adam(model.parameters(), lr=config.setting.rate),
        criterion=nn.CrossEntropyLoss(), train_mb_size=config.setting.batch, train_epochs=config.setting.epochs,
        plugins=[MitigatorPlugin(mitigator)] if mitigator else [], evaluator=None,
    )
    for experience in benchmark([(pair, pair) for pair in pairs], [0] * 3, 10).train_stream:
        begin(mitigator, experience.current_experience)
        strategy.train(experience, shuffle=False)
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("change", CHANGES)
def test_tasks_are_those_of_the_stream(change):
    """Images and classes for training and testing, as `NonStationary` gives them over the same examples."""
    tasks = Tasks(replace(TINY, change=change), 5, None)
    assert tasks.count == (2 if change == "class_incremental" else 3)
    train, test = (Examples(part.scaled(torch.arange(len(part.targets))), part.targets)
                   for part in (tasks.train, tasks.test))
    given = {} if MADE[change].memorised else {"test": test}
    stream = NonStationary(train, MADE[change], n_experiences=tasks.count, seed=5, **given)
    for number in range(tasks.count):
        for task, experience in zip(tasks.of(number), (stream.train_stream[number], stream.test_stream[number])):
            if task is not None:
                x, y = task.batch(torch.arange(len(task)))
                expected, labels, _ = zip(*experience.dataset)
                assert torch.equal(x, torch.stack(expected))
                assert y.tolist() == [*labels]
    assert (tasks.of(0)[1] is None) == (change == "random_labels")
    assert 0 <= float(train.inputs.min()) < float(train.inputs.max()) == 1


@pytest.mark.parametrize(("change", "images"), [("random_labels", [48] * 3), ("class_incremental", [20, 48])])
def test_units_are_recycled_half_way_through_each_task_whatever_its_length(configs, change, images):
    setting = replace(TINY, change=change, epochs=3)
    tasks = Tasks(setting, 0, None)
    learner = Learner(replace(configs["ReDO 0.1"], setting=setting), 0, tasks.of(0)[0])
    redo, recycled = learner.mitigator, []
    learner.optimizer.register_step_post_hook(lambda *_: recycled.append(redo.steps % redo.every == 0))
    for number in range(tasks.count):
        train = tasks.of(number)[0]
        recycled.clear()
        learner.learn(number, train)
        steps = 3 * -(-len(train) // 20)
        assert [step for step, now in enumerate(recycled, start=1) if now] == [-(-steps // 2)]
    assert [len(tasks.of(number)[0]) for number in range(tasks.count)] == images


def test_a_run_depends_on_its_seed_alone(configs, tmp_path):
    runs = [run(configs["ReDO 0.1"], tmp_path, seed=seed) for seed in (0, 0, 1)]
    first, second, other = ([{**found, "seconds": None} for found in runs])
    assert first == second
    assert first["plasticity/parameter_norm"] != other["plasticity/parameter_norm"]


@pytest.mark.parametrize("label", ["from scratch", "shrink & perturb 0.5 after each task"])
def test_methods_that_act_between_tasks_share_the_first_task_and_no_other(configs, label, tmp_path):
    plain, other = run(configs["none"], tmp_path), run(configs[label], tmp_path)
    for name in ("plasticity_experience/accuracy", "plasticity/parameter_norm", "plasticity/gradient_effective_rank"):
        assert other[name][1] == plain[name][1]
    assert other["plasticity/parameter_norm"][2] != plain["plasticity/parameter_norm"][2]


def test_from_scratch_every_task_begins_with_weights_of_the_initial_size(configs, tmp_path):
    """After 90 steps a task, norms of networks that began anew differ by less than continued training adds."""
    setting = replace(TINY, epochs=30, change="pixel_permutation")
    scratch, none = (run(configs[label], tmp_path, setting) for label in ("from scratch", "none"))
    norms = [*scratch["plasticity/parameter_norm"].values()]
    assert max(norms) - min(norms) < 0.4
    assert none["plasticity/parameter_norm"][3] > max(norms) + 0.4
    assert sorted(none["plasticity_experience/test_accuracy"]) == [1, 2, 3]


def test_a_run_measures_every_task_and_ends_with_its_summary(configs, tmp_path):
    found = run(configs["SpectralReg 0.001"], tmp_path)
    accuracy = found["plasticity_experience/accuracy"]
    assert sorted(accuracy) == [1, 2, 3]
    assert sorted(found["plasticity_experience/representation_change"]) == [2, 3]
    assert found["final_accuracy"] == {None: accuracy[3]}
    assert found["drop"] == {None: accuracy[1] - accuracy[3]}
    assert "plasticity_experience/test_accuracy" not in found
    assert b"plasticity/spectral_norm" in b"".join(path.read_bytes() for path in tmp_path.glob("events*"))


def test_the_late_accuracy_is_the_mean_of_the_last_third():
    found = summary([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.1])
    assert found == pytest.approx({"final_accuracy": 0.1, "late_accuracy": 0.3, "drop": 0.7})
    assert summary([0.5])["late_accuracy"] == 0.5


def test_the_grid_has_every_method_at_every_strength_with_and_without_layer_norm(configs):
    for name in ("SpectralReg", "L2", "L2 init", "Wasserstein", "streaming EWC", "Parseval", "shrink & perturb"):
        for strength in ("0.01", "0.001", "0.0001"):
            assert f"{name} {strength}" in configs
        assert f"{name} 0.001, LayerNorm" in configs
    for name in ("none", "from scratch", "CReLU", "ReDO 0.1", "SNR 0.02", "FIRE 1", "AdamO 0.1"):
        assert configs[f"{name}, LayerNorm"].setting.network.layer_norm
    assert [configs[label].setting.epochs for label in ("none", "none, 40 epochs", "none, 60 epochs")] == [20, 40, 60]
    parts = [experiment.configs(PlasticityOptions(part=part)) for part in PARTS]
    assert sum(map(len, parts)) == len(configs)
    assert len(grid(experiment, PlasticityOptions(seeds=1))) == len(configs)  # digests differ, labels too


def test_ranks_of_the_curvature_are_those_of_the_matrix_written_out(make):
    model = make(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))).double()
    x, y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3
    parameters = {name: 3 * p.detach() for name, p in model.named_parameters()}
    model.load_state_dict(parameters)
    matrix = torch.zeros(66, 66).double()
    for one in x:
        jacobian = torch.func.jacrev(lambda p, one=one: torch.func.functional_call(model, p, (one,)))(parameters)
        rows = torch.cat([part.flatten(1) for part in jacobian.values()], 1)
        p = model(one).softmax(0).detach()
        matrix += rows.T @ (p.diag() - p.outer(p)) @ rows / 6
    values = torch.linalg.eigvalsh(matrix).clamp(min=0)
    shares = values / values.sum()
    expected = {f"curvature/above_{least:g}": int((values > least).sum()) for least in (1e-2, 1e-3)}
    expected |= {
        "curvature/effective_rank": torch.special.entr(shares).sum().exp().item(),
        "curvature/numerical_rank": int((values > values.max() / 100).sum()),
        "curvature/sharpness": values.max().item(),
    }
    assert curvature(EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y)])) == pytest.approx(expected)


def test_what_foretells_what_is_found_where_it_was_put():
    rng = np.random.default_rng(0)
    free = {seed: [*rng.normal(size=12)] for seed in range(3)}
    led = {seed: [100.0 * seed] for seed in free}  # by the free one, of the same task and the task before
    for seed, values in free.items():
        for t in range(1, 12):
            led[seed].append(0.5 * led[seed][-1] + values[t])
    assert forward(free, led, [0, 1, 2]) == pytest.approx(1)
    assert pooled(free, led, [0, 1, 2]) < 0.95
    after = {seed: [5.0 * seed] for seed in free}
    for seed, values in free.items():
        for t in range(1, 12):
            after[seed].append(0.5 * after[seed][-1] - values[t - 1])
    assert backward(after, free, [0, 1, 2]) == pytest.approx(-1)
    assert abs(forward(after, free, [0, 1, 2])) < 0.5
    assert forward({0: [1.0] * 5}, {0: [1.0, 2.0, 4.0, 3.0, 3.0]}, [0]) is None


def test_rows_are_chosen_by_their_labels():
    chosen = experiment.configs(PlasticityOptions(method=("from scratch", "none")))
    assert [config.label for config in chosen] == ["none", "from scratch"]
    with pytest.raises(UsageError, match=r"unknown method 'L2 Init 0\.001'; did you mean 'L2 init 0.001'"):
        experiment.configs(PlasticityOptions(method=("L2 Init 0.001",)))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_names_the_files_it_needs(preset, tmp_path):
    if PRESETS[preset].images == "digits":
        return
    with pytest.raises(UsageError, match="give --dataset-root DIR, with"):
        setting_for(PlasticityOptions(preset=preset))
    with pytest.raises(UsageError, match=f"{tmp_path}.* is not there, or empty. Put into {tmp_path}"):
        setting_for(PlasticityOptions(preset=preset, dataset_root=tmp_path))


def test_a_network_for_colour_images_is_refused_for_grey_ones():
    with pytest.raises(UsageError, match="resnet18 is for colour images"):
        setting_for(PlasticityOptions(network="resnet18"))


def idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def drawn(count, *shape, classes=3):
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count, dtype=np.uint8) % classes


def write_idx(root, folder, prefix, train="train", test="t10k"):
    for part, count in ((train, 12), (test, 6)):
        images, labels = drawn(count, 28, 28)
        idx(root / folder / "raw" / f"{prefix}{part}-images-idx3-ubyte", images)
        idx(root / folder / "raw" / f"{prefix}{part}-labels-idx1-ubyte", labels)


def write_cifar(root, folder, files, key, labels_key):
    (root / folder).mkdir()
    for name, count in files.items():
        images, labels = drawn(count, 3, 32, 32)
        content = {"data": images.reshape(count, -1), labels_key: labels.tolist()}
        (root / folder / name).write_bytes(pickle.dumps(content))
    (root / folder / key).write_bytes(pickle.dumps({"label_names": ["a"], "fine_label_names": ["a"]}))


def write_svhn(root):
    from scipy.io import savemat

    for part, count in (("train", 12), ("test", 6)):
        images, labels = drawn(count, 3, 32, 32)
        savemat(root / f"{part}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None]})


def write_tiny_imagenet(root):
    from PIL import Image

    folder = root / "tiny-imagenet-200"
    names, lines = ["n01", "n02", "n03"], []
    for number, image in enumerate(drawn(12, 64, 64, 3)[0]):
        place = folder / "train" / names[number % 3] / "images"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:02}.png")  # loss-free here, JPEG there
    (folder / "val" / "images").mkdir(parents=True)
    for number, image in enumerate(drawn(6, 64, 64, 3)[0]):
        Image.fromarray(image).save(folder / "val" / "images" / f"val_{number}.png")
        lines.append(f"val_{number}.png\t{names[number % 3]}\t0\t0\t9\t9\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(names))


WRITERS = {
    "mnist": lambda root: write_idx(root, "MNIST", ""),
    "fashion": lambda root: write_idx(root, "FashionMNIST", ""),
    "emnist": lambda root: write_idx(root, "EMNIST", "emnist-balanced-", "train", "test"),
    "cifar10": lambda root: write_cifar(
        root, "cifar-10-batches-py", {f"data_batch_{n}": 3 for n in range(1, 6)} | {"test_batch": 6},
        "batches.meta", "labels",
    ),
    "cifar100": lambda root: write_cifar(
        root, "cifar-100-python", {"train": 12, "test": 6}, "meta", "fine_labels"
    ),
    "svhn": write_svhn,
    "tiny_imagenet": write_tiny_imagenet,
}


@pytest.mark.parametrize("preset", WRITERS)
def test_every_preset_reads_files_of_its_format(preset, tmp_path, unchecked):
    WRITERS[preset](tmp_path)
    setting = setting_for(PlasticityOptions(preset=preset, dataset_root=tmp_path, examples=8))
    train, test = read(setting.images, setting.count, 2, tmp_path)
    shape = {"mnist": (28, 28), "fashion": (28, 28), "emnist": (28, 28), "tiny_imagenet": (3, 64, 64)}
    images, labels = drawn(12, *shape.get(preset, (3, 32, 32)))
    if preset == "tiny_imagenet":
        images = drawn(12, 64, 64, 3)[0].transpose(0, 3, 1, 2)
    if preset == "cifar10":  # five equal files
        images, labels = np.tile(drawn(3, 3, 32, 32)[0], (5, 1, 1, 1)), np.tile([0, 1, 2], 5)
    expected = torch.from_numpy(images[:8]).reshape(train.pixels.shape)
    assert torch.equal(train.pixels, expected)
    assert train.targets.tolist() == labels[:8].tolist()
    assert len(test.targets) == 4
    assert float(train.scaled(torch.arange(8)).max()) <= 1


@pytest.mark.parametrize("preset", WRITERS)
def test_files_that_are_missing_or_empty_are_named_before_any_unit_runs(preset, tmp_path):
    WRITERS[preset](tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png"]
    for path in files:
        content = path.read_bytes()
        for spoil in (path.unlink, path.touch):  # touch makes it anew, empty
            spoil()
            with pytest.raises(UsageError, match=f"{path} is not there, or empty. Put into"):
                experiment.configs(PlasticityOptions(preset=preset, dataset_root=tmp_path))
        path.write_bytes(content)
    experiment.configs(PlasticityOptions(preset=preset, dataset_root=tmp_path))


@pytest.mark.parametrize("preset", WRITERS)
def test_damaged_files_are_told_from_a_fault_of_the_code(preset, tmp_path):
    """torchvision would ask to download them."""

    WRITERS[preset](tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0not that")
    with pytest.raises(UsageError, match=f"the files in {tmp_path}.* are damaged, or not all there .* Put there"):
        read(preset, 8, 0, tmp_path)


def test_the_small_preset_takes_the_digits_where_mnist_is_not_whole(tmp_path):
    write_idx(tmp_path, "MNIST", "")
    options = PlasticityOptions(dataset_root=tmp_path)
    assert setting_for(options).images == "mnist"
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    assert setting_for(options).images == "digits"


@dataclass(frozen=True)
class HalfResNet18:
    """ResNet-18 without its layers of 256 and 512 channels, which take nearly all of its time."""

    output = "fc"

    def build(self, shape, classes, activation):
        model = ResNet18().build(shape, classes, activation)
        model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, classes)
        return model


@pytest.mark.parametrize(
    "label",
    [
        "SpectralReg 0.0001", "ReDO 0.1",
        *(pytest.param(f"{name} 0.0001", marks=pytest.mark.slow) for name in ("L2 init", "Wasserstein", "Parseval")),
    ],
)
@pytest.mark.parametrize("network", ["resnet18", "vit_tiny"])
def test_the_large_networks_learn_a_slice(network, label, tmp_path, unchecked):
    WRITERS["cifar10"](tmp_path)
    options = PlasticityOptions(
        preset="cifar10", network=network, dataset_root=tmp_path, examples=4, tasks=2, epochs=1,
        change="pixel_permutation",
    )
    known = {config.label: config for config in experiment.configs(options)}
    chosen = VitTiny(layers=2, width=48) if network == "vit_tiny" else HalfResNet18()
    small = replace(known[label], setting=replace(known[label].setting, network=chosen, validation=0))
    records = [*experiment.run(small, 0, Context(0, True, tmp_path, tmp_path / "board"))]
    assert all(np.isfinite(record["value"]) for record in records)
    assert {"plasticity_experience/test_accuracy", "plasticity/gradient_effective_rank"} <= {
        record["metric"] for record in records
    }


def test_the_networks_are_those_of_the_paper():
    def count(network, shape, classes):
        return sum(p.numel() for p in network.build(shape, classes, nn.ReLU).parameters())

    hidden = 3 * (256 * 256 + 256)
    assert count(Mlp(), (1, 28, 28), 10) == 784 * 256 + 256 + hidden + 256 * 10 + 10
    assert count(Mlp(layer_norm=True), (1, 28, 28), 10) == count(Mlp(), (1, 28, 28), 10) + 4 * 2 * 256
    assert count(ResNet18(), (3, 64, 64), 1000) == 11_689_512  # torchvision's documentation
    block = 192 * 3 * 192 + 3 * 192 + 192 * 192 + 192 + 2 * 192 * 768 + 768 + 192 + 4 * 192
    assert count(VitTiny(), (3, 32, 32), 10) == (
        12 * block + 16 * 3 * 192 + 192 + 192 + 65 * 192 + 2 * 192 + 192 * 10 + 10
    )


def test_layer_norm_stands_between_the_linear_layer_and_its_nonlinearity():
    kinds = [type(layer).__name__ for layer in Mlp(8, 2, layer_norm=True).build((1, 2, 2), 3, nn.ReLU)]
    assert kinds == ["Flatten", *["Linear", "LayerNorm", "ReLU"] * 2, "Linear"]


def results(configs, values, seeds=(0, 1)):
    """Results from {label: the accuracies at the ends of tasks}, plus a hundredth for each seed."""
    rows, headers = [], []
    for label, accuracies in values.items():
        for seed in seeds:
            own = [{"metric": "plasticity_experience/accuracy", "step": n, "value": a + seed / 100}
                   for n, a in enumerate(accuracies, start=1)]
            late = accuracies[-1] + seed / 100
            own += [{"metric": m, "step": None, "value": v} for m, v in
                    (("late_accuracy", late), ("final_accuracy", late), ("drop", accuracies[0] - accuracies[-1]),
                     ("seconds", 1.0 + seed))]
            rows += [{**row, "label": label, "seed": seed} for row in own]
            headers.append({"label": label, "seed": seed, "config": describe(configs[label])})
    return Results(tuple(configs), tuple(rows), tuple(headers), {"units": headers})


def compared(found, label):
    """What a label gains over learning from scratch."""
    return against(found.of([label]), found)


def test_the_report_compares_with_scratch_seed_by_seed_and_layer_norm_with_its_own(configs, tmp_path):
    found = results(configs, {
        "none": [0.9, 0.2], "from scratch": [0.9, 0.8], "SpectralReg 0.001": [0.9, 0.85],
        "SpectralReg 0.01": [0.7, 0.6], "none, LayerNorm": [0.9, 0.5], "from scratch, LayerNorm": [0.9, 0.95],
        "none, 40 epochs": [0.95, 0.3],
    })
    assert compared(found, "none").mean == pytest.approx(0.2 - 0.8)
    assert compared(found, "none").std == pytest.approx(0, abs=1e-12)
    assert compared(found, "none, LayerNorm").mean == pytest.approx(0.5 - 0.95)
    assert compared(found, "from scratch") is None
    written = report(found, tmp_path)
    assert "| none | 0.905 ± 0.007 |" in " ".join(written.split())
    assert "**0.855 ± 0.007**" in written
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == ["accuracy", "layer_norm", "strengths"]
    rows = [line for line in written.splitlines() if line.startswith("| SpectralReg  ")]
    assert [cell.strip() for cell in rows[0].split("|")[2:-1]] == ["0.605 ± 0.007", "0.855 ± 0.007"]


def test_the_report_says_which_falls_first(configs, tmp_path):
    found = results(configs, {"none": [0.9, 0.8, 0.3, 0.2, 0.1, 0.1]})
    ranks = [1.0, 8.0, 9.0, 7.0, 4.0, 2.0]
    more = [{"metric": "curvature/effective_rank", "step": n, "value": value, "label": "none", "seed": seed}
            for seed in (0, 1) for n, value in enumerate(ranks, start=1)]
    written = report(replace(found, rows=(*found.rows, *more)), tmp_path)
    section = written[written.index("## Does the curvature collapse first?"):]
    row = next(line for line in section.splitlines() if line.startswith("| effective rank "))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[:6] == ["1.00 ± 0.00", "8.00 ± 0.00", "2.00 ± 0.00", "5.0 (2)", "5.0 (2)", "2 of 2"]
    assert cells[6] == f"{np.corrcoef(ranks[1:], [0.8, 0.3, 0.2, 0.1, 0.1])[0, 1]:.2f}"


def test_the_report_tells_how_many_tasks_there_were_where_classes_end(configs, tmp_path):
    growing = {label: replace(config, setting=replace(config.setting, change="class_incremental", tasks=9, epochs=1))
               for label, config in configs.items()}
    written = report(results(growing, {"none": [0.9, 0.8]}), tmp_path)
    assert "2 tasks of 1 epoch each" in written


def test_a_report_of_one_part_has_no_columns_of_the_others(configs, tmp_path):
    def written_of(values):
        return report(results({label: configs[label] for label in values}, values), tmp_path)

    assert "without" not in written_of({"none, LayerNorm": [0.9, 0.5]})
    assert "without" in written_of({"none, LayerNorm": [0.9, 0.5], "none": [0.9, 0.4]})
    written = written_of({"none, 40 epochs": [0.9, 0.5], "none, 60 epochs": [0.9, 0.6]})
    assert "as above" not in written
    assert "2 tasks of 40 or 60 epochs each" in written
    row = next(line for line in written.splitlines() if line.startswith("| none "))
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["none", "0.505 ± 0.007", "0.605 ± 0.007"]


def test_what_is_compared_with_scratch_has_the_same_norm_layers(configs):
    values = {"from scratch": [0.9, 0.8], "none, LayerNorm": [0.9, 0.5], "none, 40 epochs": [0.9, 0.5]}
    found = results({label: configs[label] for label in values}, values)
    assert compared(found, "none, LayerNorm") is None
    assert compared(found, "none, 40 epochs") is None


def test_a_report_of_nothing_but_one_run_is_written(configs, tmp_path):
    assert "| none " in report(results(configs, {"none": [0.5]}, seeds=(0,)), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "MNIST" / "raw").is_dir(), reason=f"MNIST is not in {DATA}")
def test_on_random_labels_an_unregularised_network_loses_what_spectral_regularisation_keeps(tmp_path):
    """640 images of MNIST, 15 tasks of 20 epochs; more seeds are in the table of the experiment."""
    options = PlasticityOptions(dataset_root=DATA, part="methods")
    chosen = {config.label: config for config in experiment.configs(options)}
    ends = {}
    for label in ("none", "SpectralReg 0.001"):
        records = experiment.run(chosen[label], 0, Context(0, False, DATA, tmp_path))
        (ends[label],) = (r["value"] for r in records if r["metric"] == "final_accuracy")
    assert ends["SpectralReg 0.001"] - ends["none"] > 0.4
    assert ends["SpectralReg 0.001"] > 0.87
