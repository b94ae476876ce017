"""State-space duality (Mamba-2, 2405.21060): the scan S_t = exp(a_t) S_{t-1} + x_t B_t', y_t = S_t C_t.

a_t = dt_t * A <= 0 is a log-decay per head, x is already multiplied by dt. Head i of H reads B of
group i // (H / GB) and C of group i // (H / GC). States are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo import _rust
from archzoo.ops.backend import choose, native

CHUNK = 64  # tokens per chunk; any value gives the same result, this one is the fastest measured


def segsum(a: Tensor) -> Tensor:
    """[..., Q] -> [..., Q, Q] with [i, j] = sum of a over j < k <= i, -inf above the diagonal."""
    q = a.shape[-1]
    strict = torch.ones(q, q, dtype=torch.bool, device=a.device).tril(-1)
    parts = a[..., None].expand(*a.shape, q).masked_fill(~strict, 0)
    return parts.cumsum(-2).masked_fill(~strict.fill_diagonal_(True), float("-inf"))


def ssd(
    x: Tensor,
    a: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = CHUNK,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, P] and the final state [B, H, P, N] of the scan, chunk by chunk as matrix products.

    x [B, T, H, P], a [B, T, H], B [B, T, GB, N], C [B, T, GC, N], state [B, H, P, N] or None (zeros).
    seq_idx [B, T] int resets the state where it changes (packed sequences; no initial state then).
    """
    if choose(x) == "reference":
        return _reference(x, a, B, C, state, seq_idx)
    if seq_idx is None and x.numel() and _fits(x, a, B, C, state):
        return _rust_scan(x, a, B, C, state)
    return _chunked(x, a, B, C, chunk_size, state, seq_idx)


def _fits(x: Tensor, a: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> bool:
    b, t, h, p = x.shape
    n = B.shape[-1]
    fits = a.shape == (b, t, h) and h % B.shape[2] == 0 == h % C.shape[2]
    fits = fits and (*B.shape[:2], *C.shape[:2], C.shape[-1]) == (b, t, b, t, n)
    fits = fits and (state is None or state.shape == (b, h, p, n))
    return fits and all(native(strided=v) for v in (x, a, B, C, state))


def _rust_scan(x: Tensor, a: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """All heads in one call, a chunk at a time, for inference on a CPU."""
    b, t, h, p = x.shape
    n = B.shape[-1]
    x, a, B, C = (
        x.contiguous(),
        a.contiguous(),
        B.transpose(1, 2).contiguous(),
        C.transpose(1, 2).contiguous(),
    )
    y = torch.empty_like(x)
    end = x.new_zeros(b, h, p, n) if state is None else state.clone(memory_format=torch.contiguous_format)
    _rust.ssd_scan(
        (b, t, h, p, n, B.shape[1], C.shape[1]),
        x.data_ptr(),
        a.data_ptr(),
        B.data_ptr(),
        C.data_ptr(),
        end.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y, end


def _heads(t: Tensor, heads: int) -> Tensor:
    return t.repeat_interleave(heads // t.shape[2], 2) if t.shape[2] != heads else t


def _reference(
    x: Tensor, a: Tensor, B: Tensor, C: Tensor, state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token at a time: the definition."""
    b, t, h, p = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    xf, af = x.to(wide), a.to(wide)
    Bh, Ch = _heads(B, h).to(wide), _heads(C, h).to(wide)
    s = xf.new_zeros(b, h, p, B.shape[-1]) if state is None else state.to(wide)
    ys = []
    for i in range(t):
        decay = af[:, i].exp()
        if seq_idx is not None and i > 0:
            decay = decay * (seq_idx[:, i] == seq_idx[:, i - 1])[:, None]
        s = decay[..., None, None] * s + xf[:, i, :, :, None] * Bh[:, i, :, None, :]
        ys.append((s * Ch[:, i, :, None, :]).sum(-1))
    y = torch.stack(ys, 1) if ys else xf
    return y.to(x.dtype), s


def _chunked(
    x: Tensor,
    a: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (b, t, h, p), dtype = x.shape, x.dtype
    n, gb, gc = B.shape[-1], B.shape[2], C.shape[2]
    wide = torch.promote_types(dtype, torch.float32)
    q = min(chunk_size, max(t, 1))
    pad = -t % q
    if pad:  # zeros neither decay nor add: the final state does not change
        x, B, C = (F.pad(v, (0, 0, 0, 0, 0, pad)) for v in (x, B, C))
        a = F.pad(a, (0, 0, 0, pad))
        if seq_idx is not None:
            seq_idx = torch.cat((seq_idx, seq_idx[:, -1:].expand(-1, pad)), 1)
    c, g = x.shape[1] // q, math.lcm(gb, gc)
    r = h // g  # heads of a group stand side by side, so that a group is one matrix product
    x, B, C = (v.to(wide).unflatten(1, (c, q)) for v in (x, B, C))
    B, C = (v.repeat_interleave(g // v.shape[3], 3).transpose(2, 3) for v in (B, C))  # [b, c, g, q, n]
    # Differences of long sums lose digits, so the sums are fp64; they are small beside the products.
    acum = a.unflatten(1, (c, q)).double().cumsum(2)  # [b, c, q, h]
    to_end = (acum[:, :, -1:] - acum).to(wide).exp()
    from_start = acum.to(wide).exp()
    whole = from_start[:, :, -1]  # [b, c, h]
    if seq_idx is not None:
        ids = seq_idx.unflatten(1, (c, q))
        last = ids[..., -1:]
        before = F.pad(last[:, :-1, 0], (1, 0), value=-1)[..., None]  # sequence of the incoming state
        to_end = to_end * (ids == last)[..., None]
        from_start = from_start * (ids == before)[..., None]
        whole = whole * (last == before)
    mixing = _decayed(C @ B.transpose(-1, -2), acum.transpose(2, 3))
    if seq_idx is not None:
        mixing = mixing * (ids[..., :, None] == ids[..., None, :])[:, :, None]
    y = (mixing @ x.transpose(2, 3)).transpose(2, 3)  # inside each chunk: [b, c, q, h, p]

    s = x.new_zeros(b, g, n, r * p)
    if state is not None:
        s = state.to(wide).unflatten(1, (g, r)).permute(0, 1, 4, 2, 3).flatten(-2)
    factor = whole.view(b, c, g, 1, r, 1)
    done = [x.new_zeros(b, 0, h, p)]
    for i in range(c):  # a chunk at a time: its tensors stay in the cache
        carried = (C[:, i] @ s).transpose(1, 2).reshape(b, q, h, p)
        done.append(torch.addcmul(y[:, i], carried, from_start[:, i, ..., None]))
        weighted = (x[:, i] * to_end[:, i, ..., None]).unflatten(2, (g, r)).flatten(-2).transpose(1, 2)
        added = (B[:, i].transpose(-1, -2) @ weighted).unflatten(-1, (r, p))
        s = torch.addcmul(added, s.unflatten(-1, (r, p)), factor[:, i]).flatten(-2)
    y = torch.cat(done, 1)[:, :t]
    return y.to(dtype), s.unflatten(-1, (r, p)).permute(0, 1, 3, 4, 2).flatten(1, 2)


def _decayed(scores: Tensor, sums: Tensor) -> Tensor:
    """[b, c, h, q, q]: scores [b, c, g, q, q] times exp(sum i - sum j) of sums [b, c, h, q] fp64, causal."""
    (h, q), g = sums.shape[2:], scores.shape[2]
    causal = torch.ones(q, q, dtype=torch.bool, device=scores.device).tril()
    # In two parts: the difference of the leading ones rounds by its own size, the rest corrects them.
    high = sums.to(scores.dtype)
    low = (sums - high).to(scores.dtype)
    decay = (_minus_each(high) + _minus_each(low)).masked_fill_(~causal, float("-inf")).exp()
    if h > g:
        scores = scores.repeat_interleave(h // g, 2) if g > 1 else scores.expand(-1, -1, h, -1, -1)
    return scores * decay


def _minus_each(sums: Tensor) -> Tensor:
    """[..., q] -> [..., q, q]: entry [i, j] is sum i minus sum j."""
    return sums[..., :, None] - sums[..., None, :]


def ssd_step(x: Tensor, a: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """One token: y [B, H, P] from x [B, H, P], a [B, H], B [B, GB, N], C [B, GC, N]; state in place."""
    b, h, p, n = state.shape
    wide = state.dtype
    decay = a.to(wide).exp()
    x_, B_, C_ = (t.to(wide).contiguous() for t in (x, B, C))
    fits = x.shape == (b, h, p) and a.shape == (b, h) and h % B.shape[1] == 0 == h % C.shape[1]
    fits = fits and (*B.shape[::2], *C.shape[::2]) == (b, n, b, n)
    if fits and x.numel() and native(x_, decay, B_, C_, state):
        y = torch.empty_like(x_)
        _rust.ssd_step(
            (b, h, p, n, B.shape[1], C.shape[1]),
            x_.data_ptr(),
            decay.data_ptr(),
            B_.data_ptr(),
            C_.data_ptr(),
            state.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y.to(x.dtype)
    Bh = B.repeat_interleave(h // B.shape[1], 1) if B.shape[1] != h else B
    Ch = C.repeat_interleave(h // C.shape[1], 1) if C.shape[1] != h else C
    flat = state.view(b * h, p, n)
    flat.mul_(decay.view(b * h, 1, 1))
    flat.baddbmm_(x.to(wide).reshape(b * h, p, 1), Bh.to(wide).reshape(b * h, 1, n))
    y = torch.bmm(flat, Ch.to(wide).reshape(b * h, n, 1))
    return y.view(b, h, p).to(x.dtype)
