"""The covariance of a softmax distribution, by its factor."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def softmax_covariance_factor(logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C R"]:
    """The lower triangular L with L Lᵀ = diag(p) − p pᵀ, p = softmax(logits), of rank R = C − 1.

    L_kk = √(p_k q_k / q_{k−1}) and L_ik = −(p_i / q_k) L_kk for i > k, with q_k = Σ_{j>k} p_j.
    Source: Tanabe & Sagae (1992), J. R. Statist. Soc. B 54, 211-219.

    >>> L = softmax_covariance_factor(torch.zeros(1, 2))
    >>> (L @ L.mT)[0]
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """
    p = logits.softmax(1)
    tiny = torch.finfo(p.dtype).tiny
    from_here = p.flip(1).cumsum(1).flip(1).clamp_min(tiny)  # q_{k-1}
    after = from_here[:, 1:]  # q_k
    diagonal = (p[:, :-1] / from_here[:, :-1] * after).sqrt()
    ratio = p[:, :, None] / after[:, None, :]
    below = torch.ones(p.shape[1], p.shape[1] - 1, dtype=torch.bool, device=p.device).tril(-1)
    factor = torch.where(below, -ratio, torch.zeros_like(ratio))
    factor.diagonal(dim1=1, dim2=2).fill_(1)
    return factor * diagonal[:, None, :]
