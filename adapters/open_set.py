"""How unlike everything known an image is.

A network is taken to know images on which its energy is as on those that it was made for: −logsumexp of its logits is
higher where it knows less ("Energy-based Out-of-distribution Detection", Liu et al., NeurIPS 2020, arXiv 2010.03759,
Eq. 4). A threshold on energies means nothing by itself, so the score is their rank among the source's: 0.99 says that
99 % of the source's images are better known than this one. A head knows what it was told: to the extent that it says
so (`Fusion.none`), the image is known, whatever the network makes of it.
"""

import torch
from torch import Tensor

IMAGES_MIN = 20  # with fewer a rank says little


class OpenSet:
    """Scores images by how unknown they are.

    Args:
        evidence: logsumexp of the network's logits on images of the source, [N], N ≥ 20.

    Raises:
        ValueError: too few images, or numbers that are not finite.

    >>> known = OpenSet(torch.arange(100.0))
    >>> known.unknown(torch.tensor([[1.5], [90.5], [1000.0]])).round(decimals=2)
    tensor([0.9800, 0.0900, 0.0000])
    """

    def __init__(self, evidence: Tensor) -> None:
        if len(evidence) < IMAGES_MIN or not bool(evidence.isfinite().all()):
            raise ValueError(f"an open set needs finite logits of at least {IMAGES_MIN} images, not {len(evidence)}")
        self._evidence = evidence.sort().values

    def unknown(self, logits: Tensor) -> Tensor:
        """The score of each image, [B], 0 … 1.

        Args:
            logits: of the network, [B, C].
        """
        evidence = logits.logsumexp(dim=1)
        below = torch.searchsorted(self._evidence, evidence.contiguous(), right=True)
        return 1 - below.to(evidence.dtype) / len(self._evidence)
