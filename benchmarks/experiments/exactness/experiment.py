"""When a quadratic model of past loss is enough: heads on features, from exactly quadratic to not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import nan

from torch import nn

from avalanche_curv.core import NonFiniteCurvatureError
from benchmarks.experiments.exactness.course import (
    Errors,
    accuracy,
    by_avalanche,
    joint_outputs,
    learned,
    of_sums,
    outputs_of,
    sequence,
)
from benchmarks.experiments.exactness.learner import CLASSES, joined
from benchmarks.experiments.exactness.rows import (
    AT_ONCE,
    BOTH,
    EVERY,
    EWC,
    FREE,
    GROWS,
    HEADS,
    HELD_OUT,
    JOINT,
    NAIVE,
    ONLINE,
    PAIR,
    SLOPES,
    SQUARED,
    STRUCTURES,
    Config,
    best_strengths,
    grid,
    of_the_block,
    peers,
    plain,
    settings,
    strengths,
    tunable,
    unfrozen,
)
from benchmarks.harness import Context, Record, Results
from benchmarks.harness.tuning import FIRST_SEED, SelfTuned, TunedOptions


@dataclass(frozen=True)
class ExactnessOptions(TunedOptions):
    """Fashion-MNIST on pretrained features with --dataset-root and the extra `pretrained`; on random features without
    the package, and digits on random features without --dataset-root."""


class Exactness(SelfTuned):
    """Every head with every structure and policy at λ = 1, some at a tuned λ, and what is known without a model."""

    name = "exactness"
    options_type = ExactnessOptions

    def settled(self, options: ExactnessOptions, results: Results) -> ExactnessOptions:
        return replace(options, strengths=tuple(best_strengths(results).items()))

    def configs(self, options: ExactnessOptions) -> Sequence[Config]:
        main, small, strong, domain, *many = settings(options)
        blocks = unfrozen(options)
        for setting in (main, *blocks):
            setting.features.ready(options.dataset_root)
        heads = HEADS[::2] if options.quick else HEADS
        tuned = tunable(main, heads, blocks, options.quick)
        if options.tuning:
            held_out = [replace(one, setting=replace(one.setting, held_out=HELD_OUT)) for one in tuned]
            return [
                replace(one, label=f"{one.label} at {strength:g}", strength=strength)
                for one in held_out
                for strength in strengths(one, options.quick)
            ]
        found = dict(options.strengths)
        if options.quick:
            made = [*peers(main), *plain(main, heads), *grid(main, heads, BOTH[:1], (SLOPES, "adaptive"))]
            made += grid(small, heads, ["Dense"], ["merge"])
            made += grid(many[0], [SQUARED], {"Kronecker": PAIR}, [GROWS])
            return [*made, *(replace(one, strength=found.get(one.label, one.strength)) for one in tuned)]
        made = [*peers(main), *plain(main, heads), *grid(main, heads, BOTH, EVERY)]
        made += [*plain(small, heads[:2], [JOINT]), *grid(small, heads[:2], STRUCTURES, FREE)]
        for setting in (strong, domain):
            made += plain(setting, heads[1:3], [JOINT])
            made += grid(setting, heads[1:3], BOTH, (SLOPES, "merge", "adaptive"))
        for setting in many:
            made += plain(setting, [SQUARED], [NAIVE, JOINT])
            policies = FREE[1:] if setting.tasks > CLASSES else FREE
            made += grid(setting, [SQUARED], {"Kronecker": PAIR}, (*policies, GROWS))
            made += [] if setting.tasks > CLASSES else grid(setting, [SQUARED], ["diagonal"], FREE[:1])
        made += [one for block in blocks for one in of_the_block(block)]
        return [*made, *(replace(one, strength=found.get(one.label, one.strength)) for one in tuned)]

    def run(self, config: Config, seed: int, context: Context) -> Iterator[Record]:
        seed += FIRST_SEED if config.setting.held_out else 0
        head, setting = config.head, config.setting
        tasks, test = sequence(setting, seed, context.dataset_root, head.dtype)
        if config.method in AT_ONCE:
            yield {"metric": "accuracy", "value": of_sums(config, joined(tasks), test, seed)}
            return
        if config.method == JOINT and head != SQUARED:  # the reference itself
            outputs = joint_outputs(setting, head, seed, context.dataset_root)
            yield {"metric": "accuracy", "value": accuracy(outputs, test[1])}
            return
        if config.method in (EWC, ONLINE):
            model, errors, size = by_avalanche(config, tasks, test, seed), Errors(), 0
        else:
            try:
                model, errors, size = learned(config, tasks, seed)
            except NonFiniteCurvatureError:
                model, errors, size = head.build(setting.directions, setting.outputs, seed), Errors(), 0
                nn.init.constant_(next(model.parameters()), nan)
        outputs = outputs_of(model, head, test[0])
        yield {"metric": "accuracy", "value": accuracy(outputs, test[1])}
        yield {"metric": "bytes", "value": size}
        yield from ({"metric": name, "value": value} for name, value in errors.measures().items())
        if not setting.held_out:
            reference = joint_outputs(setting, head, seed, context.dataset_root)
            apart = outputs - reference
            yield {"metric": "lost", "value": accuracy(reference, test[1]) - accuracy(outputs, test[1])}
            yield {"metric": "apart", "value": float(apart.square().sum(1).mean().sqrt())}
            yield {"metric": "apart_most", "value": float(apart.abs().max())}


experiment = Exactness()
