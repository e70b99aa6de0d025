"""What holds the learned parameters near the source's: a quadratic pull, `β Σ_i F_i (θ_i − θ0_i)²`.

With F the Fisher diagonal this is EATA's anchor (arXiv 2204.02610, Eq. 8), after elastic weight consolidation
(Kirkpatrick et al. 2017, arXiv 1612.00796, Eq. 3); with F = 1 it is a plain L2 anchor.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from adapters.base import Groups
from adapters.norm import Modulation, Network, Statistics


def gradient(params: Tensor, source: Tensor, importance: Tensor | float, weight: float) -> Tensor:
    """`∂/∂θ of β Σ F (θ − θ0)²` = `2 β F (θ − θ0)`.

    Args:
        params: θ, [S, D].
        source: θ0, [D].
        importance: F, [D]; 1.0 for L2.
        weight: β.
    """
    return 2 * weight * importance * (params - source)


def fisher_diagonal(network: Network, batches: Iterable[Tensor]) -> Tensor:
    """The Fisher diagonal of all scales and shifts, estimated as the EATA authors do.

    The network normalises with each batch's own statistics; the label is its own arg-max; the gradient is that of the
    *batch mean* of the cross-entropy, squared, then averaged over batches. (So F shrinks as batches grow: use the size
    that the weight β was chosen for, 2,000 source images in batches of 200 on CIFAR-10.)

    Args:
        network: with P normalised channels.
        batches: source images without labels, each [B, …].

    Returns:
        F for [γ | β], [2 P].

    Raises:
        ValueError: there was no batch.

    References:
        Niu et al., arXiv 2204.02610, Eq. 9 and section 4.2.
    """
    total, count = torch.zeros(2 * network.channels, device=network.scale.device), 0
    for x in batches:
        params = torch.cat([network.scale, network.shift]).requires_grad_()
        rows = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        groups = Groups.of((len(x),), x.device)
        with torch.enable_grad():  # also where the caller has switched gradients off
            scale, shift = params.unsqueeze(0).chunk(2, dim=1)
            modulation = Modulation(scale, shift, scale, shift, rows, groups, Statistics.OWN)
            logits = network(x, modulation).logits
            loss = functional.cross_entropy(logits, logits.argmax(dim=1))
            (grad,) = torch.autograd.grad(loss, params)
        total += grad.square()
        count += 1
    if not count:
        raise ValueError("the Fisher diagonal needs at least one batch of source images")
    return total / count
