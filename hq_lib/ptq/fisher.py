"""What each value at a block's output counts for the network's answer: the diagonal of the Fisher information.

    F_i = (dL / dz_i)^2,   L = -log p(y | x),   y drawn once per image from p(. | x) of the float net

z the float net's values at the block's output. BRECQ (Li et al. 2021, arXiv:2102.05426, eq. 10) weights the squared
error of each value with it in place of the full Hessian of the task loss. Departure: its code takes the gradient of
KL(float net || partly quantized net), which vanishes as the error does, and adds 1 to its magnitude; drawing the label
from the net itself is the definition of the Fisher information, needs no labels and no quantized net. Without that 1,
images that the net is sure of count for nothing; ``per_image`` makes all count alike (see ``config``).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hq_lib.ptq.progress import ReconstructionError
from hq_lib.ptq.units import as_float


class Fisher:
    """Gradients of the log-likelihood of drawn labels at one block's output, of the float net."""

    def __init__(self, rest: Sequence[fx.GraphModule], labels: Tensor, *, per_image: bool = False) -> None:
        """``rest``: the blocks behind the output, in order, () for the last one; ``labels``: (N,) int64, per image;
        ``per_image``: gradients are divided by their root mean square over each image, so that none counts for more."""
        self.rest, self.labels, self.per_image = list(rest), labels, per_image

    def gradient(self, z: Tensor, index: Tensor) -> Tensor:
        """Return dL/dz, the shape of ``z`` (B, ...), float32; ``index`` (B,) says which images these are.

        With ``per_image`` each image's has mean square 1; ones where an image's is zero throughout.
        """
        start = z.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = start.clone()  # a block may begin in place
            for graph in self.rest:
                with as_float(graph):
                    logits = graph(logits)
            loss = F.cross_entropy(logits, self.labels[index], reduction="sum")
        gradient = torch.autograd.grad(loss, start)[0]
        if not self.per_image:
            return gradient
        rows = gradient.flatten(1)
        rows = rows / rows.abs().amax(1, keepdim=True)  # squares of what is nearly certain would underflow
        rows = rows / rows.square().mean(1, keepdim=True).sqrt()
        return torch.where(rows.isfinite(), rows, 1.0).view_as(gradient)


@torch.no_grad()
def drawn_labels(blocks: Sequence[fx.GraphModule], images: Tensor, *, seed: int, batch: int = 128) -> Tensor:
    """Return (N,) int64: for each image one label drawn from the float net's softmax, the same for the same seed.

    Args:
        blocks: the whole chain, image to logits.
        images: (N, C, H, W), normalised.

    Raises:
        ReconstructionError: the network's output is not (N, classes), so that there is no softmax to draw from.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    labels = []
    for z in images.split(batch):
        for graph in blocks:
            with as_float(graph):
                z = graph(z)
        if z.dim() != 2:
            shape = tuple(z.shape)
            raise ReconstructionError(f"the Fisher loss needs logits (N, classes); this network's output is {shape}")
        labels.append(torch.multinomial(z.softmax(1), 1, generator=generator).squeeze(1))
    return torch.cat(labels)
