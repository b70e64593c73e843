"""Plain contrastive losses: what the tiled ones are compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers

CHUNK = 512
"""Rows of a chunk of `sigmoid_chunks`."""


def two_matmuls(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Compute the loss from scores per image and per text, each by a product of its own."""
    target = torch.arange(len(image), device=image.device)
    per_image, per_text = logit_scale * image @ text.T, logit_scale * text @ image.T
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2


def one_matmul(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Compute the loss from one dense matrix of scores and its transpose."""
    target = torch.arange(len(image), device=image.device)
    scores = logit_scale * image @ text.T
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def sigmoid_whole(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Compute the sigmoid loss from the whole matrix of scores."""
    sign = 2 * torch.eye(len(image), dtype=image.dtype, device=image.device) - 1
    return -F.logsigmoid(sign * (scale * image @ text.T + bias)).sum() / len(image)


def sigmoid_chunks(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Compute the sigmoid loss in chunks of rows; autograd keeps the scores of all of them."""
    total = -(scale * (image * text).sum(-1) + bias).sum()
    for first in range(0, len(image), CHUNK):
        rows = image[first : first + CHUNK]
        total = total + F.softplus(scale * rows @ text.T + bias).sum()
    return total / len(image)


def value_and_gradients(loss: peers.Loss, numbers: list[Tensor]) -> list[Tensor]:
    """Return a loss and its gradient by each of its numbers."""
    inputs = [number.detach().requires_grad_() for number in numbers]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]
