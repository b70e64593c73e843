"""What is planned on the host, to the device."""

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


def to_device(
    array: Int[np.ndarray, "..."] | Bool[np.ndarray, "..."], device: torch.device
) -> Int[Tensor, "..."] | Bool[Tensor, "..."]:
    """Move a host array to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
