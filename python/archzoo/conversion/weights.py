"""The weights of one attention layer as those of MLA or Mamba-2.

Shapes: d hidden size, H query heads and G key/value heads of D rows, r rank, dn and dr rows without and
with RoPE. Weights are [out, in].
"""

from __future__ import annotations

import torch
from torch import Tensor

from archzoo.blocks.mixers.attention import Attention
from archzoo.blocks.mixers.mamba2 import Mamba2Config
from archzoo.blocks.mixers.mla import MLAConfig
from archzoo.blocks.registry import Site
from archzoo.conversion.settings import Conversion, round_up


class SVD:
    """weight [m, n] = u diag(s) vh, in fp32 (fp64 for fp64)."""

    def __init__(self, weight: Tensor) -> None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.u, self.s, self.vh = torch.linalg.svd(weight.detach().to(wide), full_matrices=False)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best up [m, r] and down [r, n] with up @ down = weight."""
        return self.u[:, :rank], self.s[:rank, None] * self.vh[:rank]


def energy_rank(singular: Tensor, energy: float) -> int:
    """How many leading singular values hold at most `energy` of Σ σ², at least 1, up to a multiple of 8.

    The rule of X-EcoMLA (2503.11132): the value that would cross `energy` is left out before rounding.
    """
    held = singular.square().cumsum(0)
    return round_up(max(1, int((held / held[-1] <= energy).sum())))


def to_mla(attention: Attention, settings: Conversion) -> tuple[MLAConfig, dict[str, Tensor]]:
    """Config and weights of the MLA that stands in for `attention` (SVD initialisation, 2503.11132)."""
    c = attention.config
    k, v = attention.k_proj.weight.detach(), attention.v_proj.weight.detach()
    hidden = k.shape[1]
    mla = settings.mla(c, hidden)  # impossible settings are refused before any SVD
    q_svd, kv_svd = SVD(attention.q_proj.weight), SVD(torch.cat((k, v)))
    if settings.energy is not None:
        mla = settings.mla(c, hidden, *(energy_rank(svd.s, settings.energy) for svd in (q_svd, kv_svd)))
    dn, dr = mla.nope_dim, mla.rope_dim

    assert mla.q_rank is not None
    q_up, q_down = q_svd.factors(mla.q_rank)
    q_up = q_up.view(c.heads, c.head_dim, -1)
    q_up = torch.cat((q_up[:, :dn], q_up[:, -dr:]), 1)  # [H, dn + dr, r]

    kv_up, kv_down = kv_svd.factors(mla.kv_rank)
    k_up, v_up = kv_up.view(2, c.kv_heads, c.head_dim, -1)
    kv_up = torch.cat((k_up[:, :dn], v_up), 1)  # [G, dn + D, r]
    # One key with RoPE for all heads.
    k_rope = k.to(kv_down.dtype).view(c.kv_heads, c.head_dim, -1)[:, -dr:].mean(0)
    weights = {
        "q_a_proj": q_down,
        "q_b_proj": q_up.flatten(0, 1),
        "kv_a_proj": torch.cat((kv_down, k_rope)),
        "kv_b_proj": kv_up.flatten(0, 1),
        "o_proj": attention.o_proj.weight.detach().clone(),
    }
    return mla, {f"{name}.weight": w.to(k.dtype).contiguous() for name, w in weights.items()}


@torch.no_grad()
def to_mamba2(
    attention: Attention, settings: Conversion, site: Site, generator: torch.Generator
) -> tuple[Mamba2Config, dict[str, Tensor]]:
    """Config and weights of the Mamba-2 that stands in for `attention` (2408.15237, 2505.17272).

    x, B and C start as the values, keys and queries; the rest is Mamba-2's own initialisation.
    """
    config = settings.mamba2(attention.config)
    out = attention.o_proj.weight
    with torch.device("meta"):
        mixer = config.build(site)
    mixer.to(out.dtype).to_empty(device=out.device)
    mixer.reset_parameters(generator)
    _, x, b, c, _ = torch.split(mixer.in_proj.weight, list(config.splits))
    x.copy_(attention.v_proj.weight)
    b.copy_(attention.k_proj.weight)
    c.copy_(attention.q_proj.weight)
    mixer.out_proj.weight.copy_(out)
    return config, mixer.state_dict()
