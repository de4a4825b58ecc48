"""Eigenvalues of symmetric matrices: the top ones, given whole or by products, and functions of all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from avalanche_curv.core.curvature.operators import Operator

WHOLE = 1000  # matrices up to this size are decomposed whole
COARSE = 8  # vectors that the search for λ_max alone holds
TOLERANCE = 1e-5  # of the residual ‖C v − λ v‖ relative to λ
PROBES = 6  # products that look for an eigenvector that was missed

Pairs = tuple[Float[Tensor, "k"], Float[Tensor, "k P"]]
Product = Callable[[Float[Tensor, "P"]], Float[Tensor, "P"]]


def top_of_matrix(matrix: Float[Tensor, "P P"], count: int) -> Pairs:
    """The `count` eigenpairs of a symmetric matrix that are largest in magnitude, computed in float64.

    Returns the eigenvalues [count], largest magnitude first, and the eigenvectors as rows [count, P], in the type of
    `matrix`. Above P = 1000 and for less than a quarter of the pairs they come from products, to a residual of 1e-5.
    """
    if len(matrix) > WHOLE and count < len(matrix) // 4:
        return top_of_products(lambda v: matrix @ v, matrix[0], count)
    values, vectors = spectrum(matrix)
    order = values.abs().argsort(descending=True)[:count]
    return values[order].to(matrix), vectors[:, order].T.to(matrix).contiguous()


def spectrum(matrix: Float[Tensor, "P P"]) -> tuple[Float[Tensor, "P"], Float[Tensor, "P P"]]:
    """Eigenvalues in rising order and eigenvectors as columns, in float64; NaN for a matrix that is not finite."""
    if not matrix.isfinite().all():
        undefined = torch.full_like(matrix, torch.nan, dtype=torch.float64)
        return undefined[0], undefined
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
    except torch.linalg.LinAlgError:  # divide and conquer may fail where many eigenvalues are equal: then by QR steps
        found = scipy.linalg.eigh(matrix.double().cpu().numpy(), driver="ev")
        values, vectors = (torch.as_tensor(part).to(matrix.device) for part in found)
    return values, vectors


def top_of_products(product: Product, like: Float[Tensor, "P"], count: int) -> Pairs:
    """The `count` eigenpairs largest in magnitude of a symmetric matrix, from products C v alone, by Lanczos iteration
    restarted (Lehoucq et al. 1998, ARPACK).

    A vector meets each eigenspace in one direction alone, so that of an eigenvalue with many eigenvectors, as a linear
    head with squared error has, some are missed. Where two of those found are equal to 1e-5, or `PROBES` further
    products see a larger one outside (`largest_outside`), the iteration is repeated on what is left, until that brings
    no larger one.

    `product` maps v [P] to C v; `like` is any vector of this length, in whose type and on whose device products are
    taken. Returns the eigenvalues [count], largest magnitude first, and the eigenvectors as rows [count, P]; the
    residual is within 1e-5 of the eigenvalue. NaN where a product is not finite.

    >>> product = lambda v: torch.tensor([1.0, -5.0, 3.0, 0.0]) * v
    >>> top_of_products(product, torch.zeros(4), 2)[0]
    tensor([-5.,  3.])
    """
    if _is_small(len(like), count):
        return _top(_decomposed(_columns(product, like)), count, like)
    top = _by_arpack(product, like, count)
    while top[0].isfinite().all() and largest_outside(product, top[1]) > _suspicious(top[0]):
        more = _by_arpack(deflated(product, top), like, count)
        values, vectors = (torch.cat(pair) for pair in zip(top, more))
        order = values.abs().argsort(descending=True, stable=True)[:count]
        top = values[order], vectors[order]
        if float(more[0].abs().max()) <= _least(top[0]):
            break
    return top


def deflated(product: Product, pairs: Pairs) -> Product:
    """C − V Λ Vᵀ by its products: C with zero for the eigenvalues of these pairs."""
    values, vectors = pairs
    return lambda v: product(v) - (values * (vectors @ v)) @ vectors


def largest_outside(product: Product, vectors: Float[Tensor, "k P"]) -> float:
    """The Ritz value largest in magnitude of `PROBES` steps of Lanczos iteration from a random vector, outside of the
    span of orthonormal eigenvectors: a lower bound of the largest |λ| there, which few steps reach if it stands apart.

    >>> round(largest_outside(lambda v: torch.tensor([1.0, -5.0, 3.0, 0.0]) * v, torch.eye(4)[1:2]), 5)
    3.0
    """
    start = torch.randn(vectors.shape[1], generator=torch.Generator().manual_seed(1)).to(vectors)
    return float(quadrature(product, start, min(PROBES, vectors.shape[1] - len(vectors)), vectors)[0].abs().max())


def quadrature(
    product: Product, start: Float[Tensor, "P"], steps: int, outside: Float[Tensor, "k P"]
) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"]]:
    """Gauss quadrature of a matrix C by its `product`: nodes t and weights w with vᵀf(C)v = Σ_j w_j f(t_j) for
    polynomials f of degree below 2m. v is `start` without its part in the orthonormal rows `outside`, which C leaves
    invariant, of length 1.

    The nodes are the eigenvalues of the m × m tridiagonal matrix of Lanczos iteration with full reorthogonalisation,
    the weights the squared first entries of its eigenvectors (Golub & Welsch 1969). m < steps where the space is
    exhausted.

    >>> nodes, weights = quadrature(lambda v: torch.tensor([1.0, 3.0]) * v, torch.ones(2), 2, torch.empty(0, 2))
    >>> nodes.round(decimals=5).tolist(), weights.round(decimals=5).tolist()
    ([1.0, 3.0], [0.5, 0.5])
    """
    basis = start.new_empty(len(outside) + steps, len(start))
    basis[: len(outside)] = outside
    diagonal: list[float] = []
    off: list[float] = []
    direction = _orthogonal(start, outside)
    direction = direction / direction.norm()
    for step in range(len(outside), len(basis)):
        basis[step] = direction
        turned = product(direction)
        diagonal.append(float(turned @ direction))
        rest = _orthogonal(turned, basis[: step + 1])
        length = float(rest.norm())
        if length <= 10 * torch.finfo(start.dtype).eps * max(map(abs, (*diagonal, *off))):
            break
        off.append(length)
        direction = rest / length
    values, vectors = scipy.linalg.eigh_tridiagonal(np.array(diagonal), np.array(off[: len(diagonal) - 1]))
    return torch.as_tensor(values), torch.as_tensor(vectors[0] ** 2)


def _rounding(values: Float[Tensor, "k"]) -> float:
    """How large an eigenvalue of zero may come out, beside these in falling order of magnitude."""
    return float(TOLERANCE * values[0].abs())


def _least(values: Float[Tensor, "k"]) -> float:
    """The smallest of them in magnitude, and what rounding may add to it."""
    return float(values[-1].abs()) + _rounding(values)


def _suspicious(values: Float[Tensor, "k"]) -> float:
    """What is larger than this outside of eigenvalues, given in falling order of magnitude, calls for another look:
    more than the least of them, and anything but rounding where two are equal."""
    sizes = values.double().abs()
    sizes = sizes[sizes > _rounding(values)]
    repeated = (sizes[:-1] - sizes[1:] <= TOLERANCE * sizes[:-1]).any()
    return _rounding(values) if repeated else _least(values)


def largest_of_products(product: Product, like: Float[Tensor, "P"]) -> float:
    """The largest eigenvalue λ_max of a symmetric matrix to within one percent, from about ten products v ↦ C v with
    vectors of the length, type and device of `like`; not finite where a product is not.

    >>> largest_of_products(lambda v: torch.tensor([1.0, -5.0, 3.0, 0.0]) * v, torch.zeros(4))
    3.0
    """
    if len(like) <= COARSE:
        return float(_decomposed(_columns(product, like))[0].max())
    operator, start, first = _for_arpack(product, like)
    if not first.any() or not np.isfinite(first).all():  # which ARPACK refuses
        return float(first.sum())
    found = eigsh(operator, k=1, ncv=COARSE, which="LA", tol=1e-2, v0=start, return_eigenvectors=False)
    return float(found[0])


def top_of_operator(operator: Operator, like: Float[Tensor, "P"], count: int) -> Pairs:
    """The `count` eigenpairs largest in magnitude of an operator C, by products with vectors of the type of `like`.

    Returns the eigenvalues [count], largest magnitude first, and the eigenvectors as rows [count, P].
    """
    if _is_small(len(like), count):  # all columns in one pass over the examples
        return _top(_decomposed(operator.matmat(torch.eye(len(like)).to(like))), count, like)
    return top_of_products(lambda v: operator.matmat(v[:, None])[:, 0], like, count)


def _is_small(size: int, count: int) -> bool:
    """Whether a matrix is written out: small ones, and where nearly all pairs are asked for, which ARPACK refuses."""
    return size <= WHOLE or count >= size - 1


def _by_arpack(product: Product, like: Float[Tensor, "P"], count: int) -> Pairs:
    """Pairs as `top_of_products` returns them, but for those that are missed."""
    operator, start, first = _for_arpack(product, like)
    if not first.any():  # a matrix of zeros, which ARPACK refuses
        return like.new_zeros(count), torch.eye(count, len(like)).to(like)
    if not np.isfinite(first).all():
        return like.new_full((count,), torch.nan), like.new_full((count, len(like)), torch.nan)
    return _top(eigsh(operator, k=count, which="LM", tol=TOLERANCE, v0=start), count, like)


def _for_arpack(product: Product, like: Float[Tensor, "P"]) -> tuple[LinearOperator, np.ndarray, np.ndarray]:
    """The matrix as ARPACK takes it, a random vector to begin with, and the product of both."""

    def numpy_product(v: np.ndarray) -> np.ndarray:
        result = product(torch.as_tensor(v.reshape(-1), dtype=like.dtype, device=like.device))
        return result.detach().double().cpu().numpy()

    start = torch.randn(len(like), generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    operator = LinearOperator((len(like), len(like)), matvec=numpy_product, dtype=np.float64)
    return operator, start, numpy_product(start)


def _columns(product: Product, like: Float[Tensor, "P"]) -> Float[Tensor, "P P"]:
    """The matrix written out by its products."""
    return torch.stack([product(row) for row in torch.eye(len(like)).to(like)])


def _decomposed(whole: Float[Tensor, "P P"]) -> tuple[np.ndarray, ...]:
    """Eigenvalues and eigenvectors, as columns, of a matrix that is symmetric but for rounding."""
    return tuple(part.numpy() for part in spectrum(symmetrised(whole.detach().double().cpu())))


def _top(found: tuple[np.ndarray, ...], count: int, like: Tensor) -> Pairs:
    """Of eigenvalues and eigenvectors, as columns, the `count` largest in magnitude, in the type of `like`."""
    values, vectors = found
    order = np.argsort(-np.abs(values))[:count]
    rows = np.ascontiguousarray(vectors[:, order].T)
    return torch.as_tensor(values[order].copy()).to(like), torch.as_tensor(rows).to(like)


def _orthogonal(vector: Tensor, rows: Float[Tensor, "k P"]) -> Tensor:
    """The part outside the span of orthonormal rows, projected twice for rounding."""
    for _ in range(2):
        vector = vector - (rows @ vector) @ rows
    return vector


def symmetrised(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The symmetric part: rounding makes computed columns and rows differ."""
    return (matrix + matrix.T) / 2


def relative_eigenvalues(
    matrix: Float[Tensor, "n n"], past: Float[Tensor, "n n"], rounding: float, *, schur: bool = True
) -> Float[Tensor, "r"]:
    """The eigenvalues of C^{-½} S C^{-½} on the range of C = `past`, with S the Schur complement there of H = `matrix`,
    or without `schur` the block of H itself; in float64.

    >>> h = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    >>> relative_eigenvalues(h, torch.diag(torch.tensor([0.25, 0.0])), rounding=1e-6)  # (2 − 1 · 1 / 1) / 0.25
    tensor([4.], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(past.double())
    seen = values > rounding * values.abs().max()
    turned = vectors.T @ matrix.double() @ vectors
    inner = turned[seen][:, seen]
    if schur and not seen.all():
        across = turned[seen][:, ~seen]
        inner = inner - across @ torch.linalg.pinv(turned[~seen][:, ~seen], hermitian=True, rtol=rounding) @ across.T
    root = values[seen].rsqrt()
    return torch.linalg.eigvalsh(symmetrised(root[:, None] * inner * root))


def spectral_function(matrix: Float[Tensor, "n n"], function: Callable[[Tensor], Tensor]) -> Float[Tensor, "n n"]:
    """V f(Λ) Vᵀ for the symmetric matrix V Λ Vᵀ, in float64."""
    eigenvalues, vectors = torch.linalg.eigh(matrix.double())
    return ((vectors * function(eigenvalues)) @ vectors.T).to(matrix)


def inverted(values: Float[Tensor, "*n"], rounding: float = 0.0) -> Float[Tensor, "*n"]:
    """1/λ for each of these eigenvalues, and 0 for those up to `rounding` times the largest. Raises ValueError where
    one is negative beyond that.

    >>> inverted(torch.tensor([4.0, 1e-9, 0.0]), rounding=1e-6)
    tensor([0.2500, 0.0000, 0.0000])
    """
    zero = rounding * float(values.abs().max()) if values.numel() else 0.0
    if (values < -zero).any():
        raise ValueError(indefinite(float(values.min())))
    return torch.where(values > zero, 1 / values, 0.0)


def indefinite(curvature: float) -> str:
    """What to say of a quadratic model with this negative curvature."""
    return (
        f"C has the negative curvature {curvature:.3g}, along which q falls without bound: there is no minimum. "
        f"Estimate with GGN(), Fisher() or Hessian(psd=Clip()), or give a damping above {-curvature:.3g}."
    )
