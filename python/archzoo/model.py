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

from archzoo.blocks.context import Aux, Context
from archzoo.blocks.ffns.moe import MoE
from archzoo.blocks.linear import Linear
from archzoo.blocks.norm import RMSNorm
from archzoo.blocks.registry import DepthPolicy, Initialised, Mixer, Site
from archzoo.cache import Cache, State, Timeline
from archzoo.configuration import LayerSpec, ModelConfig
from archzoo.errors import CacheError, InputError
from archzoo.ops.linear import linear
from archzoo.ops.linear_loss import linear_cross_entropy


@dataclass
class Output:
    """Result of a forward call. With labels the logits [B, T, V] are only made when asked for.

    aux: in training the losses that joined `loss`, by name and weighted; for models with routers and without
    a cache the statistics of `Aux.statistics`, a row per routed layer.
    """

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

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        if self.depth is None:
            return self.parts(x, ctx, state)[0]
        return self.depth(x, ctx, state, self.parts)[0]

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


class MTP(nn.Module):
    """Predicts one token further than the hidden states it gets (2412.19437, in the checkpoints' order)."""

    def __init__(self, spec: LayerSpec, site: Site, logits_scale: float) -> None:
        super().__init__()
        d = site.hidden_size
        self.enorm, self.hnorm = RMSNorm(d, site.norm_eps), RMSNorm(d, site.norm_eps)
        self.eh_proj = Linear(2 * d, d, bias=False)
        self.layer = Layer(spec, site)
        self.norm = RMSNorm(d, site.norm_eps, logits_scale)

    def forward(self, embedded: Tensor, hidden: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        """Hidden states of t and embeddings of t + k, [B, T, d] -> what the head turns into t + k + 1."""
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))
        return self.norm(self.layer(x, ctx, state))


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
        depth = 0 if config.mtp is None else config.mtp.depth
        total = len(specs) + depth
        self.mtp = nn.ModuleList(
            MTP(specs[-1], Site(len(specs) + k, total, d, config.norm_eps), 1 / config.logits_divisor)
            for k in range(depth)
        )

    @property
    def head_weight(self) -> Tensor:
        """[V, d], the embedding itself when tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def embedded(self, input_ids: Tensor) -> Tensor:
        """ids [B, T] -> what the first layer gets [B, T, d]."""
        x: Tensor = self.embed(input_ids)
        return x if self.config.embed_scale == 1 else x * self.config.embed_scale

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> logits [..., V]."""
        return linear(hidden, self.head_weight)

    def new_cache(self, batch_size: int, max_length: int = 0) -> Cache:
        """An empty cache with room for max_length tokens (it grows beyond)."""
        for i, spec in enumerate(self.config.specs):
            if spec.ffn is not None and not spec.ffn.causal:
                raise CacheError(
                    f"layer {i}: experts that choose tokens look at later ones and cannot decode"
                )
        return self._cache(cast("list[Layer]", list(self.layers)), batch_size, max_length)

    def new_mtp_cache(self, batch_size: int, max_length: int = 0) -> Cache:
        """The same for the layers of `mtp`."""
        return self._cache([cast("MTP", module).layer for module in self.mtp], batch_size, max_length)

    def _cache(self, layers: list[Layer], batch_size: int, max_length: int) -> Cache:
        weight = self.embed.weight
        device, dtype = weight.device, weight.dtype
        states = [layer.new_state(batch_size, max_length, device, dtype) for layer in layers]
        return Cache(states, Timeline(batch_size, device))

    def context(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        aux: Aux | None = None,
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
        timeline = cache.timeline if cache is not None else None
        return Context((batch, length), device, positions, seq_idx, timeline, aux)

    def backbone(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        aux: Aux | None = None,
    ) -> Tensor:
        """Hidden states [B, T, d] after the final norm; blocks report to `aux`."""
        if aux is None and self.training and torch.is_grad_enabled():
            aux = Aux()  # the loads are counted whoever asks
        ctx = self.context(input_ids, cache, positions, cu_seqlens, aux)
        x = self.embedded(input_ids)
        for i, layer in enumerate(self.layers):
            state = cache.states[i] if cache is not None else None
            x = self._run(layer, x, ctx, state)
        if aux is not None and self.training and torch.is_grad_enabled():
            self._count(aux, 0)
        return self.norm(x)

    def _run(self, module: nn.Module, *args: object) -> Tensor:
        save_memory = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        out: Tensor = checkpoint(module, *args, use_reentrant=False) if save_memory else module(*args)
        return out

    def _routers(self) -> list[MoE]:
        """The layers whose selection bias follows their load."""
        found = (module for module in self.modules() if isinstance(module, MoE))
        return [module for module in found if module.selection_bias is not None]

    def _count(self, aux: Aux, first: int) -> None:
        """Add the loads of layers from `first` on to those since the last update.

        Not where they are found, so that a layer that runs again (gradient checkpointing) counts once.
        """
        for router in self._routers():
            if router.index >= first and router.index in aux.routings:
                load = aux.routings[router.index].load
                router.load = load if router.load is None else router.load + load

    @torch.no_grad()
    def update_router_bias(self, rate: float = 1e-3) -> None:
        """Call after each optimiser step: bias += rate * sign(mean load - load), by the loads of all tokens
        seen in training since the last call, over all processes (loss-free balancing, 2408.15664)."""
        routers = self._routers()
        if not routers:
            return
        biases = [cast("Tensor", router.selection_bias) for router in routers]
        loads = [
            b.new_zeros(b.shape) if r.load is None else r.load for r, b in zip(routers, biases, strict=True)
        ]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            whole = torch.cat(loads)
            torch.distributed.all_reduce(whole)
            loads = list(whole.split([len(load) for load in loads]))
        for router, bias, load in zip(routers, biases, loads, strict=True):
            bias += rate * torch.sign(load.mean() - load)
            router.load = None

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
        loss is the mean over them; training adds the auxiliary losses and those of `mtp`. positions [B, T]
        (int64, -1 at left padding) and cu_seqlens [n + 1] (packed sequences in one row) are optional; with a
        cache the tokens go on after those it holds.
        """
        aux = Aux() if cache is None or self.training else None
        hidden = self.backbone(input_ids, cache, positions, cu_seqlens, aux)
        if labels is None:
            extra = {} if aux is None else aux.losses() | aux.statistics()
            return Output(None, hidden, cache, extra, self.head, self.head(hidden))
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        if cu_seqlens is not None:  # the first token of a sequence is not predicted from the one before
            targets = targets.clone()
            targets[0, cu_seqlens[1:-1] - 1] = -100
        loss = linear_cross_entropy(hidden.flatten(0, 1), self.head_weight, targets.flatten())
        if aux is None:
            return Output(loss, hidden, cache, {}, self.head)
        if self.training and cache is None:
            self._predict_further(input_ids, hidden, targets, positions, cu_seqlens, aux)
        losses = aux.losses()
        for value in losses.values():
            loss = loss + value
        return Output(loss, hidden, cache, losses | aux.statistics(), self.head)

    def _predict_further(
        self,
        input_ids: Tensor,
        hidden: Tensor,
        targets: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        aux: Aux,
    ) -> None:
        """Report "mtp_loss"; targets [B, T] are those of the tokens' own prediction."""
        mtp = self.config.mtp
        for k, module in enumerate(self.mtp, 1):
            if mtp is None or k >= input_ids.shape[1]:
                break
            at = None if positions is None else positions[:, :-k]
            ctx = self.context(input_ids[:, :-k], None, at, cu_seqlens, aux)
            hidden = self._run(module, self.embedded(input_ids[:, k:]), hidden[:, : ctx.length], ctx)
            wanted = targets[:, k:]
            if cu_seqlens is not None:  # the token k further on must belong to the same sequence
                token = torch.arange(input_ids.shape[1], device=hidden.device)
                seq_idx = torch.bucketize(token, cu_seqlens[1:], right=True)
                wanted = wanted.masked_fill(seq_idx[k:] != seq_idx[:-k], -100)
            loss = linear_cross_entropy(hidden.flatten(0, 1), self.head_weight, wanted.flatten())
            aux.report("mtp_loss", k, loss * (mtp.weight / mtp.depth))
        if torch.is_grad_enabled():
            self._count(aux, len(self.layers))

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


def skeleton(config: ModelConfig, dtype: torch.dtype) -> CausalLM:
    """The module on `meta`: shapes only. Buffers keep their own dtype: router biases stay fp32."""
    with torch.device("meta"):
        model = CausalLM(config)
        keep = {name: buffer.dtype for name, buffer in model.named_buffers()}
        model = model.to(dtype)
        for name, buffer in model.named_buffers():
            buffer.data = buffer.data.to(keep[name])
    return model
