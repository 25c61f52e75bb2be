"""By what an adapter knows the model that it was trained on: samples of the decoder's linear layers.

Importing this costs no torch.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# In an adapter's files: of the layers with an adapter, and of the decoder's others.
ADAPTED, REST = "base_sample_sha256", "rest_sample_sha256"
SAMPLED = 64  # weights of each layer that go into the sample


def sample(weight: Tensor) -> bytes:
    """Shape and evenly spaced values, as bfloat16 so that loading in another dtype does not matter."""
    import torch

    values = weight.detach().flatten()
    values = values[:: max(1, values.numel() // SAMPLED)][:SAMPLED].to(torch.bfloat16).float().cpu()
    return f"{tuple(weight.shape)}".encode() + values.numpy().tobytes()


def digest(samples: Mapping[str, bytes]) -> str:
    """sha256 over the names and samples of layers."""
    total = hashlib.sha256()
    for name, found in samples.items():
        total.update(name.encode() + found)
    return total.hexdigest()
