"""Two processes that talk by gloo, started once, against one process that sees all examples."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from avalanche_curv.core import (
    GGN,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Kronecker,
    LowRank,
    Rank,
    estimate,
)
from avalanche_curv.core.distributed import ShardedRisk

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

SCRIPT = Path(__file__).with_name("two_ranks.py")
EXACT = {"rtol": 1e-12, "atol": 1e-14}
there = runpy.run_path(str(SCRIPT))
PAIRS, SHARDS, SAMPLED = there["PAIRS"], there["SHARDS"], there["SAMPLED"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two found."""
    folder = tmp_path_factory.mktemp("ranks")
    started = [
        subprocess.Popen([sys.executable, SCRIPT, str(rank), folder], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:  # one that waits for the other for ever
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def alone(constructor, dtype=torch.float64, criterion=None, shift=None):
    """The risk of all examples in one process."""
    model = there["made"](constructor, dtype)
    model = model if shift is None else there["moved"](model, shift)
    return EmpiricalRisk.snapshot(model, criterion or nn.CrossEntropyLoss(), there["batches"](0, 13, dtype))


def joined(ranks, part, name):
    """A vector from the ranges of each parameter's entries that the two ranks hold."""
    (first, ranges), (second, others) = (rank[part][name] for rank in ranks)
    pieces = [first.split([b - a for a, b in ranges]), second.split([b - a for a, b in others])]
    return torch.cat([part for pair in zip(*pieces) for part in pair])


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=lambda n: " ".join(type(p).__name__ for p in PAIRS[n]))
def test_the_curvature_over_ranks_is_that_of_one_process(ranks, number):
    expected = estimate(*PAIRS[number], alone(there["perceptron"])).curvature.dense()
    for rank in ranks:
        for shards in SHARDS if number < len(there["BY_SUMS"]) else ["uneven"]:
            torch.testing.assert_close(rank["estimates"][shards, number], expected, **EXACT)


@pytest.mark.parametrize("shards", SHARDS)
def test_so_are_the_slope_and_the_value_of_the_loss(ranks, shards):
    risk = alone(there["perceptron"])
    for rank in ranks:
        torch.testing.assert_close(rank["estimates"][shards, "slope"], risk.gradient(), **EXACT)
        assert rank["estimates"][shards, "value"] == pytest.approx(risk.value(), rel=1e-6)


@pytest.mark.parametrize("shards", SHARDS)
def test_in_single_precision_they_agree_to_its_rounding(ranks, shards):
    expected = estimate(SAMPLED, Kronecker(), alone(there["perceptron"], torch.float32)).curvature.dense()
    for rank in ranks:
        torch.testing.assert_close(rank["estimates"][shards, "float32"], expected, rtol=1e-5, atol=1e-6)


def test_convolutions_norm_layers_and_bare_parameters_are_added_too(ranks):
    expected = estimate(SAMPLED, Kronecker(), alone(there["convolutional"])).curvature.dense()
    for rank in ranks:
        torch.testing.assert_close(rank["estimates"]["convolutional"], expected, **EXACT)


def test_eigenpairs_of_large_models_agree_as_far_as_the_search_for_them_goes(ranks):
    batches = [(x, nn.functional.one_hot(y, 3).double()) for x, y in there["batches"](0, 13)]
    risk = EmpiricalRisk.snapshot(there["made"](there["wide"]), nn.MSELoss(), batches)
    expected = estimate(GGN(), LowRank(Rank(5), residual=Diagonal()), risk).curvature.dense()
    assert risk.space.size > 1000
    for rank in ranks:
        assert (rank["estimates"]["wide"] - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("number", range(2), ids=["diagonal", "low rank"])
def test_a_penalty_in_shares_has_the_value_and_the_averaged_gradient_of_the_whole(ranks, number):
    structure = (Diagonal(), LowRank(Rank(4), residual=Diagonal()))[number]
    past = sum_of = None
    for seed in (1, 2):
        sum_of = estimate(SAMPLED, structure, alone(there["perceptron"], shift=seed), gradient=seed == 2)
        past = sum_of if past is None else past + sum_of
    model, (x, y) = there["made"](there["perceptron"]), there["data"]()
    penalty = there["STRENGTH"] * past.penalty(model)
    (nn.functional.cross_entropy(model(x[:12]), y[:12]) + penalty).backward()
    for rank in ranks:
        gradient, value, again, nbytes = rank["penalties"][number]
        torch.testing.assert_close(gradient, there["gradients"](model), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(value, penalty.detach(), **EXACT)
        torch.testing.assert_close(again, penalty.detach(), **EXACT)
        whole = past.nbytes + (past.anchor.nbytes if past.gradient is None else 0)
        assert nbytes < 0.55 * whole


@pytest.mark.parametrize("first", [False, True])
def test_a_penalty_reaches_the_heads_of_past_tasks_that_the_loss_does_not(ranks, first):
    past = estimate(SAMPLED, Diagonal(), alone(lambda: there["Headed"](used=0), shift=1)).scaled(there["STRENGTH"])
    model, (x, y) = there["made"](there["Headed"]), there["data"]()
    (nn.functional.cross_entropy(model(x[:12]), y[:12]) + past.penalty(model)).backward()
    for rank in ranks:
        torch.testing.assert_close(rank["penalties"]["heads"][first], there["gradients"](model), **EXACT)


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("number", range(3), ids=["Fisher", "sampled", "empirical"])
def test_the_diagonal_of_a_model_that_no_rank_holds_is_that_of_one_that_is_held(ranks, shards, number):
    kind = PAIRS[number][0]
    expected = estimate(kind, Diagonal(), alone(there["layered"])).curvature.values
    torch.testing.assert_close(joined(ranks, "fully_sharded", (number, shards)), expected, **EXACT)


@pytest.mark.parametrize("number", range(3), ids=["Fisher", "GGN", "empirical"])
def test_sentences_of_other_lengths_take_ranks_as_many_backward_passes(ranks, number):
    """A rank with fewer columns of S than another waits for it; so do those whose sentences have other lengths."""
    model, batches = there["made"](there["tagger"]), there["sentences"](0) + there["sentences"](1)
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), batches, forward=there["tags"])
    expected = estimate((Fisher(), GGN(), EmpiricalFisher())[number], Diagonal(), risk).curvature.values
    torch.testing.assert_close(joined(ranks, "fully_sharded", ("ragged", number)), expected, **EXACT)


def test_labels_mean_on_ranks_what_the_loss_of_the_model_says(ranks):
    batches = [(batch["words"], batch["labels"][:, 1:]) for batch in there["labelled"](1)]
    next_tokens = lambda model, words: model(words)["logits"][:, :-1].movedim(-1, 1)  # noqa: E731
    model = there["made"](there["Speaker"])
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), batches, forward=next_tokens)
    expected = estimate(GGN(), Diagonal(), risk).curvature.values
    torch.testing.assert_close(joined(ranks, "fully_sharded", "labelled"), expected, **EXACT)


def test_its_penalty_adds_the_exact_gradient_to_each_shard(ranks):
    past = estimate(PAIRS[2][0], Diagonal(), alone(there["layered"])).scaled(2 * there["STRENGTH"])
    model, (x, y) = there["made"](there["layered"]), there["data"]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.25)
    penalty = past.penalty(model)
    (nn.functional.cross_entropy(model(x[:12]), y[:12]) + penalty).backward()
    for rank in ranks:
        found = rank["fully_sharded"]
        torch.testing.assert_close(found["gradient"], there["gradients"](model), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found["penalty"], penalty.detach(), **EXACT)


def test_estimating_leaves_flags_gradients_and_random_state_as_they_were(ranks):
    for rank in ranks:
        assert rank["fully_sharded"]["untouched"]
        assert rank["fully_sharded"]["anchor"]
        assert rank["randomness"]


REFUSED = {
    "EKFAC": "TypeError.*EKFAC.*Use Kronecker",
    "kind": r"ValueError.*do not agree on the curvature: GGN\(\) on rank 0, Fisher.* on rank 1",
    "structure": "ValueError.*do not agree on the structure",
    "mini-batches": r"ValueError.*multiple of 4.*\[9, 4\].*EmpiricalFisher",
    "NaN": "NonFiniteCurvatureError.*2 ranks",
    "model": "ValueError.*do not agree on the parameters",
    "values": "ValueError.*models of different values",
    "nothing": "ValueError.*no rank has any",
    "structure of shares": "TypeError.*DenseMatrix is not kept in shares",
    "unsharded": "TypeError.*'0.weight' is not sharded.*fully_shard",
    "buffers": r"ValueError.*buffers.*'1.running_mean' are \[.*torch.distributed.broadcast\(buffer, 0\).*SyncBatchNorm",
    "other buffers": r"ValueError.*do not agree on the buffers:  on rank 0, mask \(2,\) on rank 1",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_possible_ends_on_all_ranks_with_a_remedy(ranks, case):
    for rank in ranks:
        assert re.search(REFUSED[case], rank["refusals"][case]), rank["refusals"][case]


def test_a_failure_on_one_rank_is_raised_on_the_others_too(ranks):
    assert ranks[0]["refusals"]["lent"].startswith("IndexError")
    assert ranks[1]["refusals"]["lent"].startswith("RuntimeError: Rank 0 failed")
    assert ranks[1]["refusals"]["data"].startswith("ValueError: Each batch must be a pair")
    assert ranks[0]["refusals"]["data"].startswith("RuntimeError: Rank 1 failed")
    for rank in ranks:
        assert "init_process_group" in rank["early"]
        assert "'0.weight'" not in rank["fully_sharded"]["twice"]
        assert "called 2 times" in rank["fully_sharded"]["twice"]
        assert rank["fully_sharded"]["kind"].startswith("TypeError")
        assert "Put the penalty first" in rank["fully_sharded"]["too late"]


PASSES = {"sums": 4, "products": 6, "free": 4, "part": 4, "value": 4}  # at least


@pytest.mark.parametrize("part", PASSES)
def test_a_rank_that_fails_in_any_pass_stops_the_others_at_once(ranks, part):
    for words, rank in zip(("RuntimeError: Rank 1 failed.*OSError: the disk", "OSError: the disk"), ranks):
        found = rank["later_passes"][part]
        assert len(found) >= PASSES[part]
        assert all(re.match(words, raised) for raised in found), found


def test_so_does_one_that_fails_between_the_layers_of_a_sharded_model(ranks):
    for words, rank in zip(("RuntimeError: Rank 1 failed", ""), ranks):
        found = rank["fully_sharded"]
        # twice to see them repeat, to see whether they are labelled, for one to lend, to be counted, and to be read
        assert len(found["failures"]) == 6
        assert all(re.match(f"{words}.*OSError: the disk", raised) for raised in found["failures"])
        assert re.match(f"{words}.*ValueError.*Targets lie in", found["labels"])


def test_a_failure_leaves_the_ranks_in_step(ranks):
    expected = estimate(GGN(), Diagonal(), alone(there["perceptron"])).curvature.dense()
    for rank in ranks:
        torch.testing.assert_close(rank["later_passes"]["afterwards"], expected, **EXACT)


def test_running_statistics_that_differ_are_refused_and_right_once_they_are_sent_to_all(ranks):
    _, model = ranks[0]["statistics"]
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), there["batches"](0, 13))
    for rank in ranks:
        assert re.search(REFUSED["buffers"], rank["fully_sharded"]["buffers"])
        torch.testing.assert_close(
            rank["statistics"][0], estimate(Fisher(), Diagonal(), risk).curvature.dense(), **EXACT
        )


def test_without_a_process_group_the_error_says_how_to_make_one():
    with pytest.raises(RuntimeError, match=r"torchrun.*init_process_group"):
        ShardedRisk.snapshot(nn.Linear(1, 1), nn.MSELoss(), [])
