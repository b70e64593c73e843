"""Contrastive losses written down from their papers: dense, float64, one row at a time."""

import torch
from torch import Tensor


def softmax_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, text_ids: Tensor | None = None
) -> Tensor:
    """Mean over pairs of the row's and the column's cross-entropy, halved (CLIP, figure 3).

    Every loss is the plain definition: minus the log of one probability, whose denominator runs
    over the candidates that are not another pair's identical caption.
    """
    image, text, logit_scale = image.double(), text.double(), logit_scale.double()
    ids = torch.arange(len(image)) if text_ids is None else text_ids
    losses = []
    for i in range(len(image)):
        candidates = [j for j in range(len(image)) if j == i or ids[j] != ids[i]]
        to_texts = logit_scale * torch.stack([image[i] @ text[j] for j in candidates])
        to_images = logit_scale * torch.stack([image[j] @ text[i] for j in candidates])
        positive = logit_scale * (image[i] @ text[i])
        losses.append(to_texts.logsumexp(0) - positive)
        losses.append(to_images.logsumexp(0) - positive)
    return torch.stack(losses).mean() if losses else (image.sum() + text.sum() + logit_scale) * 0


def sigmoid_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Sum over all image-text pairs of -log sigmoid(+-score), per image (SigLIP, algorithm 1)."""
    image, text = image.double(), text.double()
    scores = logit_scale.double() * image @ text.T + logit_bias.double()
    signs = 2 * torch.eye(len(image), dtype=torch.float64) - 1
    # log sigmoid(x) = -log(exp(0) + exp(-x)), safe at both ends.
    losses = torch.stack([torch.zeros_like(scores), -signs * scores]).logsumexp(0)
    return losses.sum() / max(len(image), 1)
