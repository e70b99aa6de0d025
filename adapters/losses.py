"""Losses on logits."""

from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax, in nats: `H = −Σ p log p`, row by row.

    Args:
        logits: [B, C].

    Returns:
        [B], between 0 and `ln C`.

    >>> import torch
    >>> round(entropy(torch.zeros(1, 10)).item(), 4)  # ln 10
    2.3026
    """
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)
