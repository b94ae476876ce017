"""Whole models: convert every layer, or put a hybrid together from two converted models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from archzoo.blocks.ffns.glu import GLU, SwiGLUConfig
from archzoo.blocks.mixers.attention import Attention, AttentionConfig
from archzoo.blocks.mixers.mla import MLAConfig
from archzoo.blocks.registry import MixerConfig, Site
from archzoo.configuration import LayerSpec, ModelConfig
from archzoo.conversion.progress import Progress
from archzoo.conversion.settings import Conversion, layer_indices
from archzoo.conversion.upcycle import Upcycling, to_moe
from archzoo.conversion.weights import to_mamba2, to_mla
from archzoo.errors import InputError
from archzoo.model import CausalLM
from archzoo.zoo import build


def convert(
    model: CausalLM,
    target: str,
    *,
    layers: Sequence[int] | None = None,
    kv_rank: int | None = None,
    q_rank: int | None = None,
    nope_dim: int | None = None,
    rope_dim: int | None = None,
    energy: float | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    segments: int | None = None,
    shared: int | None = None,
    seed: int = 0,
) -> CausalLM:
    """A new model with the attention or the feed-forwards of `model` replaced.

    Targets: "mla", every layer latent attention by SVD (X-EcoMLA, 2503.11132); "mamba2", every layer
    Mamba-2 that starts from the attention weights (MambaInLlama, 2408.15237); "zebra-llama", MLA at
    `layers` and Mamba-2 elsewhere (2505.17272); these need distillation to be useful, their settings are
    explained at `Conversion`. "moe": experts out of the dense feed-forwards of `layers`, see `Upcycling`.
    Everything else is copied, dtype and device kept, MTP modules left out. `seed` fills what the source does
    not have (parts of Mamba-2, routers); a layer gets the same values whatever the others become.
    """
    options = {
        "layers": None if layers is None else tuple(layers),
        "kv_rank": kv_rank,
        "q_rank": q_rank,
        "nope_dim": nope_dim,
        "rope_dim": rope_dim,
        "energy": energy,
        "experts": experts,
        "top_k": top_k,
        "segments": segments,
        "shared": shared,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if model.embed.weight.is_meta:
        raise InputError("convert needs a model with weights, found one on the 'meta' device")
    if target == "moe":
        return _upcycle(model, Upcycling.of(**given), seed)
    settings = Conversion.of(target, **given)
    source, count = model.config, len(model.layers)
    latent = settings.mla_layers(count)
    sources = _sources(model)
    mixers: list[MixerConfig] = []
    state = {name: t.clone() for name, t in _main(model).items() if ".mixer." not in name}
    device = model.embed.weight.device
    with Progress("converting", count) as progress:
        for i, attention in enumerate(sources):
            weights: dict[str, Tensor]
            mixer: MixerConfig
            if i in latent:
                mixer, weights = to_mla(attention, settings)
            else:
                site = Site(i, count, source.hidden_size, source.norm_eps)
                generator = torch.Generator(device).manual_seed(seed * count + i)
                mixer, weights = to_mamba2(attention, settings, site, generator)
            mixers.append(mixer)
            state |= {f"layers.{i}.mixer.{name}": weight for name, weight in weights.items()}
            progress.step()
    suffix = _hybrid_suffix(len(latent), count) if target == "zebra-llama" else target
    return filled(converted_config(source, mixers, f"{source.name}-{suffix}"), state, model.training)


def _upcycle(model: CausalLM, settings: Upcycling, seed: int) -> CausalLM:
    source, count = model.config, len(model.layers)
    specs, state = list(source.specs), _main(model)
    for i in settings.moe_layers(count):
        moe = settings.moe(specs[i].ffn, source.hidden_size)
        ffn = model.layers[i].ffn
        assert isinstance(ffn, GLU)
        generator = torch.Generator(model.embed.weight.device).manual_seed(seed * count + i)
        weights = to_moe(ffn, moe, source.init_std, generator)
        state = {name: t for name, t in state.items() if not name.startswith(f"layers.{i}.ffn.")}
        state |= {f"layers.{i}.ffn.{name}": weight for name, weight in weights.items()}
        specs[i] = specs[i].model_copy(update={"ffn": moe})
    kept = {t.data_ptr() for t in model.state_dict().values()}
    state = {name: t.clone() if t.data_ptr() in kept else t for name, t in state.items()}
    data = source.model_dump(exclude={"layers", "mtp"}) | {"name": f"{source.name}-moe", "family": "archzoo"}
    data["source"] = f"converted from {source.name}"
    config = ModelConfig.from_dict(data | {"layers": _pattern(specs)}, data["name"])
    return filled(config, state, model.training)


def assemble(mla_model: CausalLM, mamba2_model: CausalLM, layers: Sequence[int]) -> CausalLM:
    """The hybrid with the layers `layers` of one model and the others, embedding, norm and head of the other.

    The two are all-MLA and all-Mamba-2 versions of one source, each aligned by itself before (2505.17272).
    """
    check_pair(mla_model, mamba2_model)
    count = len(mla_model.layers)
    latent = layer_indices(tuple(layers), count)
    state = {}
    for name, tensor in mamba2_model.state_dict().items():
        parts = name.split(".")
        if parts[0] != "layers" or int(parts[1]) not in latent:
            state[name] = tensor.clone()
    for i in latent:
        state |= {f"layers.{i}.{n}": t.clone() for n, t in mla_model.layers[i].state_dict().items()}
    a, b = mla_model.config, mamba2_model.config
    mixers = [(a if i in latent else b).specs[i].mixer for i in range(count)]
    name = f"{a.name.removesuffix('-mla')}-{_hybrid_suffix(len(latent), count)}"
    return filled(converted_config(b, mixers, name), state, mamba2_model.training)


def check_pair(mla_model: CausalLM, mamba2_model: CausalLM) -> None:
    """InputError unless the models are all MLA and all Mamba-2 and otherwise of one shape."""
    for model, kind in ((mla_model, "mla"), (mamba2_model, "mamba2")):
        name = model.config.name
        for i, spec in enumerate(model.config.specs):
            if spec.mixer.kind != kind:
                raise InputError(f"layer {i} of '{name}' must be '{kind}', found '{spec.mixer.kind}'")
    a, b = (
        (m.config.vocab_size, m.config.hidden_size, m.config.tie_embeddings, _without_mixers(m.config.specs))
        for m in (mla_model, mamba2_model)
    )
    if a != b:
        raise InputError(
            f"'{mla_model.config.name}' and '{mamba2_model.config.name}' must differ in their mixers only"
        )


def converted_config(source: ModelConfig, mixers: Sequence[MixerConfig], name: str) -> ModelConfig:
    """`source` with these mixers, one per layer; in the published layout ("zebra") if that can hold it."""
    specs = [s.model_copy(update={"mixer": m}) for s, m in zip(source.specs, mixers, strict=True)]
    data = source.model_dump(exclude={"layers", "mtp"}) | {"name": name, "family": _family(specs)}
    data["source"] = f"converted from {source.name}"
    return ModelConfig.from_dict(data | {"layers": _pattern(specs)}, name)


def _sources(model: CausalLM) -> list[Attention]:
    """The attention modules of a dense Llama-like model; InputError names what else was found."""
    found = []
    for i, (spec, layer) in enumerate(zip(model.config.specs, model.layers, strict=True)):
        c, mixer = spec.mixer, layer.mixer
        if not isinstance(c, AttentionConfig) or not isinstance(mixer, Attention):
            raise InputError(f"layer {i}: convert starts from attention, found mixer '{c.kind}'")
        plain = {"kind", "heads", "kv_heads", "head_dim", "rope"}
        extras = [n for n in AttentionConfig.model_fields if n not in plain and getattr(c, n)]
        if extras:
            raise InputError(f"layer {i}: convert takes plain attention, found {', '.join(extras)}")
        if spec.depth.kind != "every":
            raise InputError(f"layer {i}: convert needs depth 'every', found '{spec.depth.kind}'")
        found.append(mixer)
    return found


def _main(model: CausalLM) -> dict[str, Tensor]:
    """The model's tensors without those of MTP modules, whose layers are like the source's."""
    return {name: t for name, t in model.state_dict().items() if not name.startswith("mtp.")}


def filled(config: ModelConfig, state: dict[str, Tensor], training: bool) -> CausalLM:
    """A model that takes these very tensors as its parameters."""
    model = build(config, device="meta", dtype=state["embed.weight"].dtype)
    model.load_state_dict(state, assign=True)
    return model.train(training)


def _hybrid_suffix(latent: int, count: int) -> str:
    return f"{latent}mla-{count - latent}m2"


def _without_mixers(specs: Sequence[LayerSpec]) -> list[tuple[object, ...]]:
    return [(s.ffn, s.residual, s.depth) for s in specs]


def _family(specs: Sequence[LayerSpec]) -> str:
    """The published layout knows one MLA, at most one Mamba-2 form, and plain SwiGLU layers."""
    mixers, rest = {s.mixer for s in specs}, {(s.ffn, s.residual.kind) for s in specs}
    kinds = [m.kind for m in mixers]  # of the distinct mixers
    ffn, residual = next(iter(rest))
    plain = isinstance(ffn, SwiGLUConfig) and not ffn.bias and residual == "pre" and len(rest) == 1
    fits = plain and any(isinstance(m, MLAConfig) for m in mixers) and len(set(kinds)) == len(kinds)
    return "zebra" if fits else "archzoo"


def _pattern(specs: Sequence[LayerSpec]) -> dict[str, object]:
    """LayerPattern data: the most frequent layer is the default, the others are overrides."""
    groups: dict[LayerSpec, list[int]] = {}
    for i, spec in enumerate(specs):
        groups.setdefault(spec, []).append(i)
    default = max(groups, key=lambda spec: len(groups[spec]))
    override = []
    for spec, indices in groups.items():
        changed = {slot: block.model_dump() for slot, block in spec if block != getattr(default, slot)}
        if changed:
            override.append({"indices": indices} | changed)
    return {"count": len(specs), "default": default.model_dump(), "override": override}
