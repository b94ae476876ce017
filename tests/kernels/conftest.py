"""On a GPU, unless Triton interprets, the tensors of these tests live there."""

from __future__ import annotations

import torch

from archzoo.ops.backend import INTERPRETED

if torch.cuda.is_available() and not INTERPRETED:
    torch.set_default_device("cuda")
