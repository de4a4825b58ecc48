"""The experiments by name. Nothing is imported until one is asked for, so ``list`` is immediate.

To add an experiment, add one entry: its name, the place of its `Experiment` object, and one line for ``list``.
"""

from benchmarks.harness.registered import Registered

EXPERIMENTS = {
    "refresh": Registered(
        "benchmarks.experiments.refresh:experiment",
        "How wrong a quadratic model of past loss becomes, kept at its anchor or refreshed",
    ),
    "compare": Registered(
        "benchmarks.experiments.compare.experiment:experiment",
        "Accuracy and forgetting of the strategies of this package and of Avalanche, on one stream",
    ),
    "tune_compare": Registered(
        "benchmarks.experiments.compare.tuning:experiment",
        "Strengths for compare, on held-out examples and seeds that it never reports",
    ),
    "ewc_hessian": Registered(
        "benchmarks.experiments.ewc_hessian.experiment:experiment",
        "The Hessian's diagonal against squared gradients in EWC, each at its own strength, on permuted MNIST",
    ),
    "taylor": Registered(
        "benchmarks.experiments.taylor.experiment:experiment",
        "When a diagonal stands for the Hessian, and where its error ends and that of the expansion begins",
    ),
    "trust_region": Registered(
        "benchmarks.experiments.trust_region.experiment:experiment",
        "Accuracy against the number of refreshes, between one at each task's end and replay",
    ),
    "tune": Registered(
        "benchmarks.experiments.tune.experiment:experiment",
        "Strengths for the other experiments, on seeds that they never report",
    ),
    "sources": Registered(
        "benchmarks.experiments.sources.experiment:experiment",
        "Why quadratic pictures fail: how stale, which curvature, which trajectory",
    ),
    "speed": Registered(
        "benchmarks.experiments.speed.experiment:experiment",
        "Cost of a penalty step, of estimates and of fidelity, as ratios to plain training work",
    ),
    "cost": Registered(
        "benchmarks.experiments.cost.experiment:experiment",
        "Price and accuracy of every curvature and structure, beside other tools",
    ),
    "plasticity": Registered(
        "benchmarks.experiments.plasticity.experiment:experiment",
        "Accuracy at the end of each task against its number: whether a network stays able to learn, and by what",
    ),
    "projections": Registered(
        "benchmarks.experiments.projections.experiment:experiment",
        "Gradient projection memory and its family on ten permuted MNIST tasks, beside EWC and the multitask bound",
    ),
    "ewc_permuted_mnist": Registered(
        "benchmarks.experiments.ewc_permuted_mnist.experiment:experiment",
        "EWC on ten permuted MNIST tasks: from Avalanche's setting to the paper's 0.94, a factor at a time",
    ),
    "fisher_estimators": Registered(
        "benchmarks.experiments.fisher_estimators.experiment:experiment",
        "Five methods to compute the Fisher information, each across strengths that differ by orders of magnitude",
    ),
    "sac": Registered(
        "benchmarks.experiments.sac.experiment:experiment",
        "Spectral regularisation of actor and critic: SAC at a replay ratio of 16, on the DeepMind control suite",
    ),
    "leakage": Registered(
        "benchmarks.experiments.leakage.experiment:experiment",
        "What leaks back into a protected subspace: sequential against one basis, gradient against step",
    ),
    "rank_cut": Registered(
        "benchmarks.experiments.rank_cut:experiment",
        "A rank cut beyond the number of parameters freezes them, though the accuracy of batches fluctuates",
    ),
    "soft_hard": Registered(
        "benchmarks.experiments.soft_hard:experiment",
        "A penalty against a projection on the same subspaces: accuracy on the past and on the present",
    ),
}
