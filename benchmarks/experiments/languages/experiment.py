"""Bits per byte of a small GPT that learns English, Python, C++ and YAML in turn: what each method keeps of them."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated, Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from avalanche_curv.core import (
    EKFAC,
    Accumulate,
    Diagonal,
    EmpiricalFisher,
    Fisher,
    KeepTerms,
    Kronecker,
    NonFiniteCurvatureError,
)
from benchmarks.experiments.languages.gpt import GPT, Size, with_adapters
from benchmarks.experiments.languages.methods import (
    L2,
    Joint,
    LastByte,
    Memory,
    Merged,
    Method,
    Naive,
    Quadratic,
    Replay,
    as_forks,
    windows,
)
from benchmarks.experiments.languages.text import LANGUAGES, Parts, language
from benchmarks.harness import Context, Record, Results
from benchmarks.harness.experiment import digest
from benchmarks.harness.kept import kept
from benchmarks.harness.options import one_of
from benchmarks.harness.tuning import FIRST_SEED, SelfTuned, TunedOptions, best

AT_ONCE_TESTED = 256  # windows
LIST = Kronecker(KeepTerms())


@dataclass(frozen=True)
class Setting:
    """The model; `first_steps` steps on the first language at that rate, `steps` on each other one, with batches of so
    many windows and Adam; and the bytes of each language to train on. Held out: tested on text held out for tuning."""

    size: Size
    first_steps: int
    steps: int
    batch: int
    rate: float
    text: int
    held_out: bool = False


SETTINGS = {
    "small": Setting(Size(2, 48, 4, 32), 600, 80, 16, 1e-2, 2**17),
    "medium": Setting(Size(4, 256, 8, 128), 5_000, 1_000, 32, 1e-3, 2**18),  # hours of a core
    "large": Setting(Size(6, 384, 6, 256), 20_000, 3_000, 64, 1e-3, 2**18),  # days
}
QUICK = Setting(Size(2, 16, 2, 16), 10, 4, 8, 1e-2, 2**13)


NAIVE, AT_ONCE, FORKS = "Naive", "all at once", "EWC, squared batch gradients"
REPLAY, LESS_REPLAY, WEIGHTS = "Replay of 16 KiB", "Replay of 2 KiB", "L2"
EMPIRICAL = "empirical Fisher, diagonal"
SAMPLED = tuple(f"Fisher of one sample, {structure}" for structure in ("diagonal", "Kronecker", "EKFAC"))
MERGED = tuple(f"{row} of W + B A" for row in SAMPLED[:2])
OWN_ANCHORS = f"{SAMPLED[1]}, own anchors"
EXACT = "exact Fisher, diagonal"
BASELINES = NAIVE, REPLAY, FORKS
"""What the report tests against."""


class Trained(ABC):
    """What is trained after the first language, at `slower` times the rate of the first."""

    name: str
    slower: float

    @abstractmethod
    def prepare(self, model: GPT) -> GPT:
        """The model as it goes on."""

    @abstractmethod
    def methods(self, batch: int, quick: bool) -> dict[str, Method]:
        """By their names in the tables. Strengths are such that the best is none of the ends."""


@dataclass(frozen=True)
class Full(Trained):
    """All weights."""

    slower: float = 0.5
    name = "all weights"

    def prepare(self, model: GPT) -> GPT:
        return model

    def methods(self, batch: int, quick: bool) -> dict[str, Method]:
        many, few = (8, 2) if quick else (512, 16)  # windows; the exact Fisher takes 256 passes backward
        return {
            NAIVE: Naive(), AT_ONCE: Joint(),
            LESS_REPLAY: Replay(2_048, batch), REPLAY: Replay(16_384, batch),
            WEIGHTS: L2(halves(-6, -2)),
            FORKS: as_forks(batch, many, halves(5, 9)),
            EMPIRICAL: Quadratic(EmpiricalFisher(), Diagonal(), many, halves(3, 7)),
            SAMPLED[0]: Quadratic(ONE_SAMPLE, Diagonal(), many, halves(0, 4)),
            SAMPLED[1]: Quadratic(ONE_SAMPLE, LIST, many, halves(0, 4)),
            SAMPLED[2]: Quadratic(ONE_SAMPLE, EKFAC(KeepTerms()), many, halves(0, 4)),
            OWN_ANCHORS: Quadratic(ONE_SAMPLE, LIST, many, halves(-1, 3), policy=Accumulate()),
            EXACT: Quadratic(Fisher(), Diagonal(), few, halves(0, 4), LastByte()),
        }  # fmt: skip


@dataclass(frozen=True)
class LoRA(Trained):
    """Adapters of this rank on the linear layers of the blocks."""

    rank: int = 4
    slower: float = 1.0
    name = "LoRA"

    def prepare(self, model: GPT) -> GPT:
        return with_adapters(model, self.rank)

    def methods(self, batch: int, quick: bool) -> dict[str, Method]:
        many = 8 if quick else 512
        return {
            NAIVE: Naive(), AT_ONCE: Joint(), REPLAY: Replay(16_384, batch),
            WEIGHTS: L2(halves(-6, -2)),
            FORKS: as_forks(batch, many, halves(5, 9)),
            SAMPLED[0]: Quadratic(ONE_SAMPLE, Diagonal(), many, halves(0, 4)),
            SAMPLED[1]: Quadratic(ONE_SAMPLE, LIST, many, halves(0, 4)),
            MERGED[0]: Quadratic(ONE_SAMPLE, Diagonal(), many, halves(-1, 3), Merged()),
            MERGED[1]: Quadratic(ONE_SAMPLE, LIST, many, halves(-1, 3), Merged()),
        }  # fmt: skip


def halves(first: int, last: int) -> tuple[float, ...]:
    """Powers of √10, rounded.

    >>> halves(-1, 2)
    (0.3, 1.0, 3.0, 10.0)
    """
    return tuple(float(f"{(1, 3)[power % 2]}e{power // 2}") for power in range(first, last + 1))


ONE_SAMPLE = Fisher(samples=1, seed=0)
TRAINED: tuple[Trained, ...] = (Full(), LoRA())


@dataclass(frozen=True)
class Config:
    """What is trained after the first language, and what is kept of languages seen."""

    label: str
    row: str
    part: str
    setting: Setting
    trained: Trained
    method: Method
    strength: float = 0.0
    cost: float = 1.0


@dataclass(frozen=True)
class LanguagesOptions(TunedOptions):
    size: Annotated[str, one_of("size", SETTINGS)] = "small"
    """of the model, with its steps; medium: hours a run on one core, large: days"""
    tied: bool = False
    """whether the head of the model has the weights of its embedding"""


class Languages(SelfTuned):
    """Bits per byte on every language after each.

    First each strength is tried with seed 1000, on text held out for it; that of the fewest bits per byte on all
    languages at the end, among equal ones the smallest, is the one of the report.
    """

    name = "languages"
    options_type = LanguagesOptions

    def variant(self, options: LanguagesOptions) -> str:
        parts = options.size * (options.size != "small"), "tied" * options.tied, super().variant(options)
        return "-".join(filter(None, parts))

    def settled(self, options: LanguagesOptions, results: Results) -> LanguagesOptions:
        return replace(options, strengths=tuple(best_strengths(results).items()))

    def configs(self, options: LanguagesOptions) -> Sequence[Config]:
        setting = QUICK if options.quick else SETTINGS[options.size]
        setting = replace(setting, size=replace(setting.size, tied=options.tied), held_out=options.tuning)
        found, made = dict(options.strengths), []
        for trained in TRAINED:
            for row, method in trained.methods(setting.batch, options.quick).items():
                label = f"{trained.name}, {row}"
                strength = found.get(label, method.grid[0] if method.grid else 0.0)
                cost = 2.0 if row == EXACT else 1.0
                made.append(Config(label, row, trained.name, setting, trained, method, strength, cost))
        if not options.tuning:
            return made
        tried = slice(1 if options.quick else None)
        return [
            replace(one, label=f"{one.label} at {strength:g}", strength=strength)
            for one in made
            if not (options.quick and one.row == EXACT)
            for strength in one.method.grid[tried]
        ]

    def run(self, config: Config, seed: int, context: Context) -> Iterator[Record]:
        seed += FIRST_SEED * config.setting.held_out
        texts = {name: language(name, config.setting.text) for name in LANGUAGES}
        model = pretrained(config.setting, texts, seed)
        torch.manual_seed(seed)
        for name, text in texts.items():
            yield {"metric": "bytes", "value": len(text.train), "row": name, "digest": text.digest}
        model = config.trained.prepare(model)
        yield {"metric": "parameters", "value": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        yield from course(config, model, texts, seed)


def best_strengths(results: Results) -> dict[str, float]:
    """By the label of a report: the strength of the fewest bits per byte, among equal ones the smallest."""
    tried = (
        (f"{row['part']}, {row['row']}", row["strength"], one.final("mean_bits"))
        for one in results.each() for row in [one.first]
    )  # fmt: skip
    return best(tried, least=True)


def pretrained(setting: Setting, texts: Mapping[str, Parts], seed: int) -> GPT:
    """A model that has learned the first language, the same for every method of a seed; kept below --out."""
    first = next(iter(texts))
    torch.manual_seed(seed)
    model, generator = GPT(setting.size), torch.Generator().manual_seed(seed)

    def trained() -> dict[str, Any]:
        memory = Naive().memory(0.0)
        fit(model, [texts[first].train], memory, setting, setting.first_steps, setting.rate, generator)
        return {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    which = digest([replace(setting, held_out=False), texts[first].digest, seed, torch.__version__])
    model.load_state_dict({name: torch.tensor(array) for name, array in kept(f"languages-{which}", trained).items()})
    return model


def course(config: Config, model: GPT, texts: Mapping[str, Parts], seed: int) -> Iterator[Record]:
    """Learn the other languages in turn. After each, the bits per byte on every one, seen or not; the step is the
    number of the language. Then means, and what it took."""
    setting, (first, *others) = config.setting, texts
    tests = {name: text.held_out if setting.held_out else text.test for name, text in texts.items()}
    generator, drawn = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    memory, last, seconds = config.method.memory(config.strength), first, 0.0
    stages, found = config.method.stages(first, others), [bits(model, tests, setting)]
    rate = setting.rate * config.trained.slower
    yield from _row(found[0], 1)
    for number, stage in enumerate(stages, start=1):
        start = time.process_time()
        try:
            memory.keep(model, texts[last].train, setting.size.context, drawn)
        except NonFiniteCurvatureError:
            yield {"metric": "mean_bits", "value": math.nan}
            return
        steps = setting.steps * len(others) // len(stages)
        fit(model, [texts[name].train for name in stage], memory, setting, steps, rate, generator)
        seconds += time.process_time() - start
        found.append(bits(model, tests, setting))
        yield from _row(found[-1], 1 + number * len(others) // len(stages))
        last = stage[-1]
    values = {"seconds": seconds, "kept_bytes": memory.nbytes, **summary([list(row.values()) for row in found])}
    yield from ({"metric": metric, "value": value} for metric, value in values.items())


def fit(
    model: nn.Module, data: Sequence[UInt8[Tensor, "n"]], memory: Memory, setting: Setting, steps: int, rate: float,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """So many steps of Adam on windows of each text, as many of each as of the others."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    each = -(-setting.batch // len(data))
    for _ in range(steps):
        drawn = [windows(text, each, setting.size.context, generator) for text in data]
        inputs, targets = (torch.cat(parts) for parts in zip(*drawn))
        loss = cross_entropy(model(inputs), targets) + memory.term(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def bits(model: nn.Module, texts: Mapping[str, UInt8[Tensor, "n"]], setting: Setting) -> dict[str, float]:
    """Bits per byte on each text: −log₂ of the probability of a byte, its mean over those of windows side by side that
    have a byte before them in theirs. 8 of a model that knows nothing."""
    found = {}
    for name, text in texts.items():
        length = setting.size.context + 1
        side_by_side = text[: len(text) // length * length].view(-1, length).long()
        parts = [
            cross_entropy(model(part[:, :-1]), part[:, 1:], reduction="sum")
            for part in side_by_side.split(AT_ONCE_TESTED)
        ]
        found[name] = float(torch.stack(parts).sum()) / side_by_side[:, 1:].numel() / math.log(2)
    return found


def _row(found: Mapping[str, float], step: int) -> Iterator[Record]:
    yield from ({"metric": f"bits/{name}", "value": value, "step": step} for name, value in found.items())
    seen = list(found.values())[:step]
    yield {"metric": "bits/seen", "value": fmean(seen), "step": step}


def summary(found: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of the bits b_{t,j} on language j after stage t: their mean over j after the last stage, the mean of the b_{j,j},
    and forgetting, the mean of b_{T,j} − b_{j,j} over all j but the last. Of languages learned at once, in one stage
    after the first, all is that of the last.

    >>> {name: round(value, 3) for name, value in summary([[2.0, 8.0], [3.0, 2.0]]).items()}
    {'mean_bits': 2.5, 'learned': 2.0, 'forgetting': 1.0}
    """
    last, count = found[-1], len(found[-1])
    learned = [found[j][j] for j in range(count)] if len(found) == count else list(last)
    rises = [now - then for now, then in zip(last[:-1], learned)]
    return {"mean_bits": fmean(last), "learned": fmean(learned), "forgetting": fmean(rises)}


experiment = Languages()
