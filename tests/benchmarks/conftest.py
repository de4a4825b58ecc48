"""Data sets of a few random images in the files of the true ones, the tiny experiment, and a browser."""

import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from joblib.externals.loky import get_reusable_executor

from benchmarks.harness.command import main
from benchmarks.registry import Registered

HERE = Path(__file__).parent
TINY = {
    "tiny": Registered("tiny_experiment:experiment", "a tiny experiment", "tiny_experiment:report"),
    "titan": Registered("nowhere:experiment", "another", "nowhere:report"),
    "staged": Registered("tiny_experiment:staged", "one that needs the tiny one", "tiny_experiment:report"),
}
ARGUMENTS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1600,2400",
    "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
TINY_CLASSES, CORE50_CLASSES = 200, 50


def pictures(count, *shape, classes):
    """So many random pictures, and their classes in turn."""
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count, dtype=np.uint8) % classes


def write_idx(folder):
    folder.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 30)):
        for kind, array in zip(("images-idx3", "labels-idx1"), pictures(count, 28, 28, classes=10)):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())


def write_cifar(folder, files, meta, classes, labels):
    folder.mkdir()
    for name, count in files.items():
        images, targets = pictures(count, 3, 32, 32, classes=classes)
        content = {"data": images.reshape(count, -1), labels: targets.tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / meta).write_bytes(pickle.dumps({"label_names": ["a"], "fine_label_names": ["a"]}))


def write_tiny_imagenet(folder):
    names, lines = [f"n{number:08}" for number in range(TINY_CLASSES)], []
    images, _ = pictures(2 * TINY_CLASSES, 64, 64, 3, classes=TINY_CLASSES)
    (folder / "val" / "images").mkdir(parents=True)
    for number, name in enumerate(names):
        save(images[number], folder / "train" / name / "images" / f"{name}_0.JPEG")
        save(images[TINY_CLASSES + number], folder / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(names) + "\n")


def save(picture, path):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def write_core50(folder):
    """Ten orders of new classes: 10, then 5 in each batch, from class `run` on; one order of new sessions."""
    images, _ = pictures(2 * CORE50_CLASSES, 128, 128, 3, classes=CORE50_CLASSES)
    train, test = ([f"s{session}/o{c}.png" for c in range(CORE50_CLASSES)] for session in (1, 3))
    for picture, path in zip(images, train + test):
        save(picture, folder / "core50_128x128" / path)
    write_lists(folder / "batches_filelists" / "NI_inc" / "run0", [range(CORE50_CLASSES)] * 8, train, test)
    for run in range(10):
        order = np.roll(range(CORE50_CLASSES), -run)
        batches = np.split(order, range(10, CORE50_CLASSES, 5))
        write_lists(folder / "batches_filelists" / "NC_inc" / f"run{run}", batches, train, test)
    nothing = {"ni": {0: [[] for _ in range(9)]}}
    names = {"nc": {run: dict.fromkeys(range(CORE50_CLASSES), "scissor1") for run in range(10)}}
    for name, content in (("paths", []), ("LUP", nothing), ("labels", nothing), ("labels2names", names)):
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(content))


def write_lists(folder, batches, train, test):
    folder.mkdir(parents=True)
    for number, classes in enumerate(batches):
        (folder / f"train_batch_{number:02}_filelist.txt").write_text("".join(f"{train[c]} {c}\n" for c in classes))
    (folder / "test_filelist.txt").write_text("".join(f"{path} {c}\n" for c, path in enumerate(test)))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A --dataset-root with a few pictures of each data set."""
    root = tmp_path_factory.mktemp("data")
    write_idx(root / "MNIST" / "raw")
    write_idx(root / "FashionMNIST" / "raw")
    batches = {f"data_batch_{number}": 20 for number in range(1, 6)} | {"test_batch": 20}
    write_cifar(root / "cifar-10-batches-py", batches, "batches.meta", 10, "labels")
    write_cifar(root / "cifar-100-python", {"train": 200, "test": 100}, "meta", 100, "fine_labels")
    write_tiny_imagenet(root / "tiny-imagenet-200")
    write_core50(root / "core50")
    return root


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision compares the checksums of CIFAR and SVHN with those of the true files."""
    from torchvision.datasets import CIFAR10, SVHN, cifar, svhn

    for module in (cifar, svhn):
        monkeypatch.setattr(module, "check_integrity", lambda *args: True)
    for kind in (CIFAR10, SVHN):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Run a command line of the tiny experiment, or any with `main`, in this process: the exit status."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("TINY_LOG", str(tmp_path / "log"))
    monkeypatch.delenv("TINY_FAULT", raising=False)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")

    def command(*words, out="out", jobs=1):
        extra = ["--jobs", str(jobs)] if words[0] == "run" and jobs else []
        status = main([words[0], "tiny", *words[1:], "--out", str(tmp_path / out), *extra], TINY)
        if jobs and jobs > 1:  # so that the next run starts processes that know its environment
            get_reusable_executor(reuse=True).shutdown(kill_workers=True)
        return status

    def records(out="out"):
        """The lines of each unit that are the same in every run: neither the header nor the timings."""
        units = {path.name: path.read_text().splitlines()[1:] for path in (tmp_path / out).glob("tiny/units/*.jsonl")}
        return {name: [line for line in lines if '"timing": true' not in line] for name, lines in units.items()}

    command.out = tmp_path / "out" / "tiny"
    command.started = lambda: (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []
    command.main = lambda *words: main([*words], TINY)
    command.units = lambda: {path.name: path.read_bytes() for path in command.out.glob("units/*.jsonl")}
    command.records = records
    return command


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium with a profile of its own that reaches only this machine."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is missing: pip install -e '.[test]'")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("a browser is missing: apt-get install chromium chromium-driver")
    chosen = webdriver.ChromeOptions()
    chosen.binary_location = chromium
    chosen.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in [*ARGUMENTS, f"user-data-dir={tmp_path / 'profile'}"]:
        chosen.add_argument(f"--{argument}")
    opened = webdriver.Chrome(options=chosen, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="session")
def results_of(tmp_path_factory):
    """results_of(experiment, configs, seed=0): the results of quick runs of some configurations with one seed."""
    from benchmarks.harness import Context, Results
    from benchmarks.harness.experiment import describe

    def measured(experiment, configs, seed=0):
        rows, headers = [], []
        for config in configs:
            unit = {"label": config.label, "seed": seed}
            for record in experiment.run(config, seed, Context(seed, True, None, tmp_path_factory.mktemp("board"))):
                rows.append({"step": None, **record, "value": float(record["value"]), **unit})
            headers.append({**unit, "config": describe(config)})
        return Results(tuple(config.label for config in configs), tuple(rows), tuple(headers))

    return measured
