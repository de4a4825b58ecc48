"""What two processes compute together for `test_distributed`, which starts this file once for each rank."""

import copy
import sys
import warnings
from datetime import timedelta
from itertools import count, takewhile

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from avalanche_curv.core import (
    EKFAC,
    GGN,
    BatchedEmpiricalFisher,
    BlockDiagonal,
    Clip,
    Dense,
    Diagonal,
    EmpiricalFisher,
    Energy,
    Fisher,
    FlatSpectrum,
    Hessian,
    Kronecker,
    LowRank,
    MatrixFree,
    PerLayer,
    Rank,
)
from avalanche_curv.core.distributed import (
    LocalShards,
    Ranks,
    ShardedQuadratic,
    ShardedRisk,
    estimate_fully_sharded,
    estimate_sharded,
)

EXAMPLES, CLASSES, BATCH, STRENGTH = 13, 3, 4, 0.7
SHARDS = {"uneven": (9, 4), "empty": (13, 0), "late": (0, 13)}  # how many examples each rank has
SAMPLED = Fisher(samples=2, seed=5)
BY_SUMS = [
    (Fisher(), Diagonal()), (SAMPLED, Diagonal()), (EmpiricalFisher(), Diagonal()), (Hessian(Clip()), Diagonal()),
    (GGN(), Dense()), (BatchedEmpiricalFisher(3), Dense()), (Hessian(Clip()), BlockDiagonal(PerLayer())),
    (Fisher(), Kronecker()), (SAMPLED, Kronecker()), (EmpiricalFisher(), Kronecker()),
    (SAMPLED, Kronecker(cut=Rank(1))),
]
BY_PRODUCTS = [
    (GGN(), LowRank(Rank(4), residual=Diagonal())), (SAMPLED, LowRank(Energy(0.9))),
    (Hessian(Clip()), FlatSpectrum(LowRank(Rank(3)))), (Fisher(), BlockDiagonal(PerLayer(), LowRank(Rank(2)))),
    (SAMPLED, MatrixFree()), (EmpiricalFisher(), MatrixFree(fraction=0.4, seed=2)),
]
PAIRS = [*BY_SUMS, *BY_PRODUCTS]


def perceptron():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def convolutional():
    """With a norm layer, beside the Kronecker factors, and a bare parameter that no layer explains."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), Scale(), nn.Flatten(), nn.LayerNorm(27),
        nn.Linear(27, CLASSES),
    )


class Headed(nn.Module):
    """A trunk and two heads, of which one is in use."""

    def __init__(self, used=1):
        super().__init__()
        self.trunk, self.heads = nn.Linear(4, 5), nn.ModuleList(nn.Linear(5, CLASSES) for _ in range(2))
        self.used = used

    def forward(self, x):
        return self.heads[self.used](torch.tanh(self.trunk(x)))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        return torch.tanh(self.factor * x)


def wide():
    """Of more than the 1,000 parameters up to which matrices are decomposed whole."""
    return nn.Sequential(nn.Linear(4, 150), nn.Tanh(), nn.Linear(150, CLASSES))


def layered():
    """What `fully_shard` is applied to: rows that two ranks do not share evenly, and more rows than one."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.LayerNorm(27),
        nn.Linear(27, 5), nn.Tanh(), nn.Linear(5, CLASSES),
    )


def tagger():
    """Of tokens, which sequences have of several numbers."""
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def tags(model, words):
    """[N, C, T]."""
    return model(words).movedim(-1, 1)


class Speaker(nn.Module):
    """A tagger that returns a loss of next tokens for labels, and whose name says nothing of it."""

    def __init__(self):
        super().__init__()
        self.layers = tagger()

    def forward(self, words, labels=None):
        logits = self.layers(words)
        entropy = lambda: nn.functional.cross_entropy(logits[:, :-1].movedim(-1, 1), labels[:, 1:])  # noqa: E731
        return {"logits": logits} | ({} if labels is None else {"loss": entropy()})


def labelled(rank):
    """The sentences as mappings with labels; rank 0 has none."""
    return [{"words": x, "labels": x % CLASSES} for x, _ in sentences(0) + sentences(1)] if rank else []


def sentences(rank):
    """Batches of sentences of several lengths, the longest of them on rank 0; their last token does not count."""
    generator = torch.Generator().manual_seed(rank)
    shapes = [(2, 3), (1, 6)] if rank == 0 else [(3, 2)]
    words = [torch.randint(6, shape, generator=generator) for shape in shapes]
    return [(x, (x % CLASSES).index_fill(1, torch.tensor([x.shape[1] - 1]), -100)) for x in words]


def normed():
    """With running statistics."""
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES))


def trained_in_copies(rank):
    """What DistributedDataParallel leaves of it after steps in training: equal parameters, other running statistics."""
    ddp = DistributedDataParallel(made(normed))
    optimiser = torch.optim.SGD(ddp.parameters(), lr=0.1)
    x, y = data()
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(ddp(x[rank::2][:6]), y[rank::2][:6]).backward()
        optimiser.step()
    return ddp.module


def made(constructor, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return constructor().to(dtype)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(CLASSES, (EXAMPLES,), generator=generator)


def batches(begin, end, dtype=torch.float64):
    x, y = data(dtype)
    return list(zip(x[begin:end].split(BATCH), y[begin:end].split(BATCH))) if end > begin else []


def mine(shards, rank, dtype=torch.float64):
    return batches(sum(SHARDS[shards][:rank]), sum(SHARDS[shards][: rank + 1]), dtype)


def moved(model, seed):
    """A copy of the model somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
    return other


class Failing:
    """Batches that cannot be read in the pass of this number."""

    def __init__(self, batches, number):
        self.batches, self.left = batches, number

    def __iter__(self):
        self.left -= 1
        if not self.left:
            raise OSError("the disk is gone")
        yield from self.batches


def failures(rank, function):
    """What is raised where rank 1 fails in the first pass over its batches, in the second, ..., up to the last."""
    own = mine("uneven", rank)
    found = (raised(lambda n=n: function(Failing(own, n if rank else 0))) for n in count(1))
    return list(takewhile(lambda words: words != "nothing", found))


def raised(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def gradients(model):
    return torch.cat([(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).reshape(-1)
                      for p in model.parameters()])


def estimates(rank):
    criterion, found = nn.CrossEntropyLoss(), {}
    for shards in SHARDS:
        risk = ShardedRisk.snapshot(made(perceptron), criterion, mine(shards, rank))
        for number, pair in enumerate(PAIRS if shards == "uneven" else BY_SUMS):
            past = estimate_sharded(*pair, risk, gradient=True)
            found[shards, number] = past.curvature.dense()
            found[shards, "slope"], found[shards, "value"] = past.gradient, torch.tensor(risk.value())
        single = ShardedRisk.snapshot(
            made(perceptron, torch.float32), criterion, mine(shards, rank, torch.float32)
        )
        found[shards, "float32"] = estimate_sharded(SAMPLED, Kronecker(), single).curvature.dense()
    risk = ShardedRisk.snapshot(made(convolutional), criterion, mine("uneven", rank))
    found["convolutional"] = estimate_sharded(SAMPLED, Kronecker(), risk).curvature.dense()
    risk = ShardedRisk.snapshot(made(wide), nn.MSELoss(), [
        (x, torch.nn.functional.one_hot(y, CLASSES).double()) for x, y in mine("uneven", rank)
    ])
    found["wide"] = estimate_sharded(GGN(), LowRank(Rank(5), residual=Diagonal()), risk).curvature.dense()
    return found


def refusals(rank):
    criterion, model = nn.CrossEntropyLoss(), made(perceptron)
    own = mine("uneven", rank)
    risk = ShardedRisk.snapshot(model, criterion, own)
    spoilt = [(x * torch.nan if rank == 1 else x, y) for x, y in own]
    broken = ShardedRisk.snapshot(model, criterion, spoilt)
    return {
        "EKFAC": raised(lambda: estimate_sharded(Fisher(), EKFAC(), risk)),
        "kind": raised(lambda: estimate_sharded(Fisher() if rank else GGN(), Diagonal(), risk)),
        "structure": raised(lambda: estimate_sharded(GGN(), LowRank(Rank(2 + rank)), risk)),
        "mini-batches": raised(lambda: estimate_sharded(BatchedEmpiricalFisher(4), Diagonal(), risk)),
        "NaN": raised(lambda: estimate_sharded(GGN(), Kronecker(), broken)),
        "model": raised(lambda: ShardedRisk.snapshot(made(wide) if rank else model, criterion, own)),
        "values": raised(lambda: ShardedRisk.snapshot(moved(model, 1) if rank else model, criterion, own)),
        "data": raised(lambda: ShardedRisk.snapshot(model, criterion, [(x, y, y) for x, y in own] if rank else own)),
        "nothing": raised(lambda: ShardedRisk.snapshot(model, criterion, [])),
        "structure of shares": raised(lambda: ShardedQuadratic.of(estimate_sharded(GGN(), Dense(), risk))),
        "unsharded": raised(lambda: estimate_fully_sharded(GGN(), model, criterion, own)),
        "buffers": raised(lambda: ShardedRisk.snapshot(trained_in_copies(rank), criterion, own)),
        "other buffers": raised(lambda: ShardedRisk.snapshot(buffered(rank), criterion, own)),
        "lent": raised(lambda: ShardedRisk.snapshot(model, criterion, [] if rank else [(x, [*y]) for x, y in own])),
    }


def buffered(rank):
    """A copy with one more buffer on rank 1."""
    model = made(perceptron)
    if rank:
        model.register_buffer("mask", torch.ones(2))
    return model


def later_passes(rank):
    """Failures of one rank in all passes of an estimate, and an estimate after these."""
    criterion = nn.CrossEntropyLoss()

    def risk_of(own):
        return ShardedRisk.snapshot(made(perceptron), criterion, own)

    def product(past):
        return past.curvature.product(past.anchor)

    return {
        "sums": failures(rank, lambda own: estimate_sharded(SAMPLED, Kronecker(), risk_of(own), gradient=True)),
        "products": failures(rank, lambda own: estimate_sharded(GGN(), BlockDiagonal(PerLayer(), LowRank(Rank(2))),
                                                                risk_of(own))),
        "free": failures(rank, lambda own: product(estimate_sharded(Fisher(), MatrixFree(), risk_of(own)))),
        "part": failures(rank, lambda own: estimate_sharded(GGN(), MatrixFree(fraction=0.4), risk_of(own))),
        "value": failures(rank, lambda own: risk_of(own).value()),
        "afterwards": estimate_sharded(GGN(), Diagonal(), risk_of(mine("uneven", rank))).curvature.dense(),
    }


def statistics(rank):
    """The curvature of a model whose running statistics differed, by the remedy that the error gives."""
    model = trained_in_copies(rank)
    for buffer in model.buffers():
        distributed.broadcast(buffer, 0)
    risk = ShardedRisk.snapshot(model, nn.CrossEntropyLoss(), mine("uneven", rank))
    return estimate_sharded(Fisher(), Diagonal(), risk).curvature.dense(), model


def penalties(rank):
    """Value and gradient of the task's loss and a penalty of two experiences, after ranks have averaged gradients."""
    criterion, found = nn.CrossEntropyLoss(), {}
    for number, structure in enumerate((Diagonal(), LowRank(Rank(4), residual=Diagonal()))):
        model, kept = made(perceptron), []
        for seed in (1, 2):
            risk = ShardedRisk.snapshot(moved(model, seed), criterion, mine("uneven", rank))
            kept.append(ShardedQuadratic.of(estimate_sharded(SAMPLED, structure, risk, gradient=seed == 2)))
        past = (kept[0] + kept[1]).scaled(STRENGTH)
        ddp = DistributedDataParallel(model)
        x, y = data()
        loss = criterion(ddp(x[rank::2][:6]), y[rank::2][:6]) + past.penalty(ddp)
        loss.backward()
        found[number] = gradients(ddp), past.penalty(ddp).detach(), past(ddp), past.nbytes
    found["heads"] = [headed(rank, first) for first in (False, True)]
    return found


def headed(rank, first):
    """The gradient of a loss that does not reach a past head, and of a penalty that does, evaluated first or last; of a
    second step, in which DistributedDataParallel knows what the first one left unused."""
    past_model, model = made(lambda: Headed(used=0)), made(Headed)
    risk = ShardedRisk.snapshot(moved(past_model, 1), nn.CrossEntropyLoss(), mine("uneven", rank))
    past = ShardedQuadratic.of(estimate_sharded(SAMPLED, Diagonal(), risk)).scaled(STRENGTH)
    ddp = DistributedDataParallel(model)
    x, y = data()
    for _ in range(2):
        ddp.zero_grad()
        penalty = past.penalty(ddp) if first else 0.0
        loss = nn.functional.cross_entropy(ddp(x[rank::2][:6]), y[rank::2][:6])
        (loss + (penalty if first else past.penalty(ddp))).backward()
    return gradients(ddp)


def fully_sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    criterion, found = nn.CrossEntropyLoss(), {}
    model, mesh = made(layered), init_device_mesh("cpu", (2,))
    for layer in (model[1], model[5]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    share = LocalShards.of_model(model)
    found["failures"] = failures(rank, lambda own: estimate_fully_sharded(Fisher(), model, criterion, own))
    wrong = [(x, y + 5 * rank) for x, y in mine("uneven", rank)]
    found["labels"] = raised(lambda: estimate_fully_sharded(EmpiricalFisher(), model, criterion, wrong))
    for number, kind in enumerate((Fisher(), SAMPLED, EmpiricalFisher())):
        for shards in SHARDS:
            kept = estimate_fully_sharded(kind, model, criterion, mine(shards, rank))
            found[number, shards] = kept.curvature.diagonal, share.ranges
    found["untouched"] = model.training and all(p.grad is None for p in model.parameters())
    anchored = share.of(torch.cat([p.detach().reshape(-1) for p in made(layered).parameters()]))
    found["anchor"] = torch.equal(kept.anchor, anchored)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.25)
    x, y = data()
    past = (kept + kept).scaled(STRENGTH)
    loss = past.penalty(model) + criterion(model(x[rank::2][:6]), y[rank::2][:6])
    found["too late"] = raised(lambda: past.penalty(model))
    loss.backward()
    found["gradient"], found["penalty"] = gradients(model), past(model)
    words = made(tagger)
    for layer in (words[1], words[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(words, mesh=mesh)
    for number, kind in enumerate((Fisher(), GGN(), EmpiricalFisher())):
        kept = estimate_fully_sharded(kind, words, criterion, sentences(rank), forward=tags)
        found["ragged", number] = kept.curvature.diagonal, LocalShards.of_model(words).ranges
    speaker = made(Speaker)
    fully_shard(speaker, mesh=mesh)
    kept = estimate_fully_sharded(GGN(), speaker, criterion, labelled(rank))
    found["labelled"] = kept.curvature.diagonal, LocalShards.of_model(speaker).ranges
    tied = nn.Sequential(layer := made(lambda: nn.Linear(4, 4)), nn.Tanh(), layer)
    fully_shard(tied, mesh=mesh)
    found["twice"] = raised(lambda: estimate_fully_sharded(Fisher(), tied, criterion, mine("uneven", rank)))
    other = trained_in_copies(rank)
    fully_shard(other, mesh=mesh)
    found["buffers"] = raised(lambda: estimate_fully_sharded(Fisher(), other, criterion, mine("uneven", rank)))
    found["kind"] = raised(lambda: estimate_fully_sharded(Hessian(), model, criterion, mine("uneven", rank)))
    return found


def main(rank, folder):
    warnings.simplefilter("ignore")
    found = {"early": raised(lambda: Ranks().size)}
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    state = torch.get_rng_state()
    for part in (estimates, refusals, later_passes, statistics, penalties, fully_sharded):
        found[part.__name__] = part(rank)
    found["randomness"] = torch.equal(state, torch.get_rng_state())
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
