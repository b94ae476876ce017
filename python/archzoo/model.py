"""CausalLM: embedding, one loop over layers, final norm, head."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from archzoo.blocks.context import Context
from archzoo.blocks.linear import Linear
from archzoo.blocks.norm import RMSNorm
from archzoo.blocks.registry import DepthPolicy, Initialised, Mixer, Site
from archzoo.cache import Cache, State, Timeline
from archzoo.configuration import LayerSpec, ModelConfig
from archzoo.errors import InputError
from archzoo.ops.linear import linear
from archzoo.ops.linear_loss import linear_cross_entropy


@dataclass
class Output:
    """Result of a forward call. With labels the logits [B, T, V] are only made when asked for."""

    loss: Tensor | None
    hidden: Tensor
    cache: Cache | None
    aux: dict[str, Tensor]
    _head: Callable[[Tensor], Tensor] = field(repr=False)
    _logits: Tensor | None = field(default=None, repr=False)

    @property
    def logits(self) -> Tensor:
        if self._logits is None:
            self._logits = self._head(self.hidden)
        return self._logits


class Layer(nn.Module):
    """norm -> mixer -> add -> norm -> feed-forward -> add, under a depth policy."""

    mixer: Mixer
    depth: DepthPolicy | None

    def __init__(self, spec: LayerSpec, site: Site) -> None:
        super().__init__()
        scale = spec.residual.norm_scale(site.index)
        self.residual_scale = spec.residual.scale
        self.mixer_norm = RMSNorm(site.hidden_size, site.norm_eps, scale)
        self.mixer = spec.mixer.build(site)
        self.ffn_norm = RMSNorm(site.hidden_size, site.norm_eps, scale) if spec.ffn is not None else None
        self.ffn = spec.ffn.build(site) if spec.ffn is not None else None
        self.depth = spec.depth.build(site)

    def forward(
        self, x: Tensor, ctx: Context, state: State | None = None, aux: list[Tensor] | None = None
    ) -> Tensor:
        """x [B, T, d] -> [B, T, d]; auxiliary losses are appended to `aux`."""
        if self.depth is None:
            return self.parts(x, ctx, state)[0]
        y, _, loss = self.depth(x, ctx, state, self.parts)
        if loss is not None and aux is not None:
            aux.append(loss)
        return y

    def parts(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, Tensor]:
        """(layer output, mixer output before its addition), both [B, T, d], for every token of x."""
        mixed = self._scaled(self.mixer(self.mixer_norm(x), ctx, state))
        if self.ffn is None or self.ffn_norm is None:
            return x + mixed, mixed
        normed, x = self.ffn_norm.add(mixed, x)
        return x + self._scaled(self.ffn(normed, ctx)), mixed

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1 else x * self.residual_scale

    def new_state(self, batch: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        if self.depth is None:
            return self.mixer.new_state(batch, slots, device, dtype)
        return self.depth.new_state(self.mixer, batch, slots, device, dtype)


class CausalLM(nn.Module):
    """A decoder-only language model built from a ModelConfig."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        d, specs = config.hidden_size, config.specs
        self.embed = nn.Embedding(config.vocab_size, d)
        self.layers = nn.ModuleList(
            Layer(spec, Site(i, len(specs), d, config.norm_eps)) for i, spec in enumerate(specs)
        )
        self.norm = RMSNorm(d, config.norm_eps, 1 / config.logits_divisor)
        self.lm_head = None if config.tie_embeddings else Linear(d, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, d], the embedding itself when tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> logits [..., V]."""
        return linear(hidden, self.head_weight)

    def new_cache(self, batch_size: int, max_length: int = 0) -> Cache:
        """An empty cache with room for max_length tokens (it grows beyond)."""
        weight = self.embed.weight
        layers = cast("list[Layer]", list(self.layers))
        device, dtype = weight.device, weight.dtype
        states = [layer.new_state(batch_size, max_length, device, dtype) for layer in layers]
        return Cache(states, Timeline(batch_size, device))

    def context(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Context:
        """Positions and masks of one call; checks what can be checked without reading tensors."""
        if input_ids.dim() != 2:
            raise InputError(f"input_ids must be [batch, tokens], found {list(input_ids.shape)}")
        batch, length = input_ids.shape
        device = input_ids.device
        seq_idx = None
        if cu_seqlens is not None:
            if cache is not None:
                raise InputError("cu_seqlens packs whole sequences and cannot be combined with a cache")
            if batch != 1:
                raise InputError(f"cu_seqlens needs batch 1, found {batch}")
            at = torch.arange(length, device=device)
            seq_idx = torch.bucketize(at, cu_seqlens[1:], right=True)
            if positions is None:
                positions = (at - cu_seqlens[seq_idx])[None]
            seq_idx = seq_idx[None]
        if cache is not None and cache.batch_size != batch:
            raise InputError(f"the cache holds {cache.batch_size} sequences, input_ids {batch}")
        if positions is not None and positions.shape != input_ids.shape:
            raise InputError(
                f"positions {list(positions.shape)} must have the shape of input_ids {list(input_ids.shape)}"
            )
        past = cache.length if cache is not None else 0
        if positions is None and past + length > self.config.max_positions:
            raise InputError(
                f"position {past + length - 1} is beyond the model's limit of "
                f"{self.config.max_positions} positions"
            )
        return Context((batch, length), device, positions, seq_idx, cache.timeline if cache else None)

    def backbone(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        aux: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [B, T, d] after the final norm."""
        ctx = self.context(input_ids, cache, positions, cu_seqlens)
        x = self.embed(input_ids)
        if self.config.embed_scale != 1:
            x = x * self.config.embed_scale
        save_memory = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            state = cache.states[i] if cache is not None else None
            if save_memory:
                x = checkpoint(layer, x, ctx, state, aux, use_reentrant=False)
            else:
                x = layer(x, ctx, state, aux)
        return self.norm(x)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Output:
        """input_ids [B, T] -> Output.

        labels [B, T] are the input ids themselves (-100 is ignored): token t is predicted from t - 1, the
        loss is the mean over them. positions [B, T] (int64, -1 at left padding) and cu_seqlens [n + 1]
        (packed sequences in one row) are optional; with a cache the tokens go on after those it holds.
        """
        aux: list[Tensor] = []
        hidden = self.backbone(input_ids, cache, positions, cu_seqlens, aux)
        extra: dict[str, Tensor] = {"depth_loss": torch.stack(aux).mean()} if aux else {}
        if labels is None:
            return Output(None, hidden, cache, extra, self.head, self.head(hidden))
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        if cu_seqlens is not None:  # the first token of a sequence is not predicted from the one before
            targets = targets.clone()
            targets[0, cu_seqlens[1:-1] - 1] = -100
        loss = linear_cross_entropy(hidden.flatten(0, 1), self.head_weight, targets.flatten())
        if aux:
            loss = loss + extra["depth_loss"]
        return Output(loss, hidden, cache, extra, self.head)

    def init_weights(self, seed: int = 0) -> None:
        """Fill every parameter: N(0, init_std), or as its block says. Same seed, same bytes.

        Every parameter draws from a generator of its own, seeded by its name, so the threads can share the
        work and a tensor does not depend on what else the model holds.
        """
        jobs: list[tuple[str, Callable[..., object]]] = []
        own: set[int] = set()
        for name, module in self.named_modules():
            if isinstance(module, Initialised):
                jobs.append((name, module.reset_parameters))
                own |= {id(p) for p in module.parameters()}
        for name, param in self.named_parameters():
            if id(param) in own:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(param)
            else:
                jobs.append((name, partial(nn.init.normal_, param, 0.0, self.config.init_std)))
        for buffer in self.buffers():
            buffer.zero_()
        device, inference = self.embed.weight.device, torch.is_inference_mode_enabled()

        def run(job: tuple[str, Callable[..., object]]) -> None:
            name, fill = job
            digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
            with torch.inference_mode(inference):  # a mode holds for one thread only
                fill(generator=torch.Generator(device=device).manual_seed(int.from_bytes(digest)))

        workers = torch.get_num_threads() if device.type == "cpu" else 1
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run, jobs))
