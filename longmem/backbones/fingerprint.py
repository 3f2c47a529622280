"""Fingerprints of backbones: whether two compute the same keys and values."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .base import Backbone
    from .layers import DecoderLayer

VERSION = "v2"
# From the widest to the narrowest; the last two round differently, and neither holds the other.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LANES = 4096  # 64-bit words that one sum covers
_SAMPLES = 128
_DIGEST = "[0-9a-f]{16}"
_FORM = re.compile(
    rf"{VERSION}:({_DIGEST}):(\w+):(\w+={_DIGEST}(?:,\w+={_DIGEST})*):([0-9a-f]{{{4 * _SAMPLES}}})(?:/(.*))?"
)
_OLD_FORM = re.compile(rf"{_DIGEST}/layers .*")


def fingerprint(backbone: Backbone) -> str:
    """Identifies what a backbone computes: all of its weights, and every setting that they leave open.

    The string holds a digest of the settings, the format of the weights, a digest of the weights in this format and in
    every narrower one, and a sample of them; `difference` compares two. Digests are sums of integers modulo 2^64,
    taken where the weights lie: the same on every device and for every number of threads.
    """
    dtype = backbone.dtype
    own = FLOATS.index(dtype)
    tensors = _weights(backbone)
    # bfloat16 and float16 weights are both rounded to the other too.
    formats = FLOATS[min(own, 2) :]
    digests = ",".join(f"{_short(kind)}={_digest(tensors, kind)}" for kind in formats)
    return f"{VERSION}:{_settings(backbone)}:{_short(dtype)}:{digests}:{_sample(tensors)}"


def difference(theirs: str, ours: str) -> str | None:
    """Names what differs between the models of two fingerprints, in words; None when they are the same.

    Fingerprints may end in "/" and the memory layers (`LongMem.fingerprint`). The same model may be loaded in
    different formats: then weights must agree after rounding to the narrower one. Rounding float32 weights to bfloat16
    and to float16 leaves no format in which they are equal again; there a sample must agree to a unit of bfloat16.
    """
    if theirs == ours:
        return None
    mine, other = _Parsed.of(ours), _Parsed.of(theirs)
    if mine is None or other is None:
        if mine is not None and _OLD_FORM.fullmatch(theirs):
            return (
                "an older version of longmem wrote it, whose fingerprints saw only a part of the weights and no"
                " settings; make it again with this version"
            )
        return f"it is {theirs or 'unnamed'}, wanted {ours or 'unnamed'}"
    if other.settings != mine.settings:
        return (
            "settings of its backbone differ, such as rotary positions, norms, activation, heads, windows or scales"
            f" ({other.brief}, wanted {mine.brief})"
        )
    if not _same_weights(other, mine):
        return f"weights of its backbone differ ({other.brief}, wanted {mine.brief})"
    if other.layers != mine.layers:
        return f"its memory is that of {other.layers}, wanted {mine.layers}"
    return None


@dataclass(frozen=True)
class _Parsed:
    settings: str
    dtype: str
    digests: dict[str, str]
    sample: str
    layers: str

    @classmethod
    def of(cls, text: str) -> _Parsed | None:
        found = _FORM.fullmatch(text)
        if found is None:
            return None
        settings, dtype, listed, sample, layers = found.groups()
        digests = dict(part.split("=") for part in listed.split(","))
        return cls(settings, dtype, digests, sample, layers or "") if dtype in digests else None

    @property
    def brief(self) -> str:
        return f"{self.settings[:8]} {self.dtype} {self.digests[self.dtype][:8]}"


def _same_weights(a: _Parsed, b: _Parsed) -> bool:
    order = [_short(kind) for kind in FLOATS]
    halves = set(order[2:])
    if {a.dtype, b.dtype} != halves:
        narrower = max(a.dtype, b.dtype, key=order.index)
        return a.digests.get(narrower, "") == b.digests.get(narrower)
    # One may be a rounding of the other, or both of float32 weights that are neither.
    shared = a.digests.items() & b.digests.items()
    return any(kind in halves for kind, _ in shared) or _samples_agree(a.sample, b.sample)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Settings: what the wiring and the model's modules do with the weights.


def _settings(backbone: Backbone) -> str:
    about = {
        "settings": backbone.settings,
        "norms": [_epsilon(backbone.norm), _epsilon(backbone.embed_norm)],
        "layers": [_layer_settings(backbone.layer(i)) for i in range(len(backbone.layers))],
        "rotary": _changed_positions(backbone),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _layer_settings(layer: DecoderLayer) -> list[Any]:
    norms = (layer.input_norm, layer.mlp_norm, layer.output_norm, layer.query_norm, layer.key_norm)
    shape: list[Any] = [layer.heads, layer.kv_heads, layer.head_dim, layer.window, float(layer.scale), layer.parallel]
    kind = None if layer.rotary is None else layer.rotary.kind
    parts = [[_epsilon(norm) for norm in norms], _epsilons_within(layer.mlp), _activations(layer.mlp)]
    return [*shape, kind, layer.rotary is not None, *parts]


def _epsilon(norm: nn.Module | None) -> float | None:
    """Under the names that PyTorch and `transformers` give it."""
    value = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    return None if value is None else float(value)


def _epsilons_within(mlp: nn.Module) -> list[float]:
    """Epsilons of the norms inside a feed-forward."""
    return [value for module in mlp.modules() if (value := _epsilon(module)) is not None]


def _activations(mlp: nn.Module) -> list[Any]:
    """Some values of each module without weights in a feed-forward, its activation and nothing else, to three
    digits: whatever it is called, and whoever exchanged it."""
    places = torch.tensor([-3.0, -1.0, -0.25, 0.25, 1.0, 3.0], device="cpu")
    found: list[Any] = []
    for module in mlp.modules():
        holds = next(module.children(), None) is not None or next(module.parameters(), None) is not None
        if holds or isinstance(module, (nn.Dropout, nn.Identity)):
            continue
        try:
            found.append([round(value, 3) + 0.0 for value in module(places).flatten().tolist()])
        except Exception:  # one of another kind, that takes something else
            found.append(type(module).__name__)
    return found


def _changed_positions(backbone: Backbone) -> list[Any]:
    """The numbers of rotary positions, to three digits, where they are not those that the model's configuration gives:
    somebody has changed them afterwards, or they have no configuration. Rounded to 16 bits they are the same."""
    layers = [backbone.layer(i).rotary for i in range(len(backbone.layers))]
    changed: list[Any] = []
    for angles in {id(rotary.angles): rotary.angles for rotary in layers if rotary is not None}.values():
        wanted: dict[str, Tensor] = {}
        if (config := getattr(angles, "config", None)) is not None:
            with torch.device("cpu"):
                wanted = _position_numbers(type(angles)(config))
        found = _position_numbers(angles)
        if any(name not in wanted or not _equal_but_rounded(x, wanted[name]) for name, x in found.items()):
            changed.append({name: [f"{value:.2e}" for value in x.tolist()] for name, x in found.items()})
    return changed


def _position_numbers(angles: nn.Module) -> dict[str, Tensor]:
    """Frequencies, and what cos and sin are multiplied by."""
    numbers = {name: buffer.flatten() for name, buffer in angles.named_buffers() if not buffer.is_meta}
    scales = {name: value for name, value in vars(angles).items() if name.endswith("attention_scaling")}
    return {name: x.detach().double().cpu() for name, x in numbers.items()} | {
        name: torch.tensor([float(value)], dtype=torch.float64) for name, value in scales.items()
    }


def _equal_but_rounded(x: Tensor, wanted: Tensor) -> bool:
    rounded = (wanted, *(wanted.to(half).double() for half in FLOATS[2:]))
    return x.shape == wanted.shape and any(torch.allclose(x, one, rtol=1e-5, atol=0) for one in rounded)


# Weights.


def _weights(backbone: Backbone) -> list[tuple[str, Tensor]]:
    """Parameters, the buffers that scale something, and what quantised modules keep beside them, each under all its
    names. Rotary frequencies follow from the settings, and their last bits depend on the machine."""
    found: dict[str, Tensor] = dict(backbone.named_parameters(remove_duplicate=False))
    known = found | dict(backbone.named_buffers(remove_duplicate=False))
    found |= {name: buffer for name, buffer in known.items() if name not in found and ".rotary." not in name}
    packed = {name: value for name, value in backbone.state_dict().items() if name not in known}
    return [*found.items(), *(part for name, value in packed.items() for part in _unpacked(name, value))]


def _unpacked(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in something that a module keeps."""
    if isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _unpacked(f"{name}.{i}", part)
    elif isinstance(value, Tensor) and value.is_quantized:
        per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
        scale = value.q_per_channel_scales() if per_channel else torch.tensor([value.q_scale()])
        yield from ((name, value.int_repr()), (f"{name}.scale", scale.double()))
    elif isinstance(value, Tensor):
        yield name, value


def _digest(tensors: list[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    found, sums = hashlib.sha256(), {}
    for name, tensor in tensors:
        if id(tensor) not in sums:  # weights that are tied are summed once, and the same as where they are not
            sums[id(tensor)] = _row_sums(tensor.detach().reshape(-1), dtype).cpu().numpy().tobytes()
        found.update(f"{name}{tuple(tensor.shape)}".encode() + sums[id(tensor)])
    return found.hexdigest()[:16]


def _row_sums(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """int64 [rows] of the bits of `flat` as `dtype`, `_LANES` words to a row: sums of their products with odd keys,
    modulo 2^64. A word that changes alone always changes its sum."""
    keys = _keys(flat.device)
    # A piece fits into a CPU's cache; a GPU wants few launches. It is whole rows in every dtype.
    piece = 2**24 if flat.is_cuda else 2**18
    sums = []
    for part in flat.split(piece):
        if part.is_floating_point():
            part = part.to(dtype)
        words = part.view(torch.uint8) if _aligned(part) else part.clone().view(torch.uint8)
        if missing := -len(words) % (8 * _LANES):
            words = F.pad(words, (0, missing))
        words = words.view(torch.int64)
        # Upper bits reach the lower ones too: of two changed sign bits the products alone would cancel.
        words = words ^ (words >> 29)
        sums.append((words.view(-1, _LANES) * keys).sum(1))
    return torch.cat(sums) if sums else torch.empty(0, dtype=torch.int64)


def _aligned(part: Tensor) -> bool:
    return part.storage_offset() * part.element_size() % 8 == 0


@functools.cache
def _keys(device: torch.device) -> Tensor:
    draw = random.Random(0)  # the same in every version of Python, unlike PyTorch's generator
    return torch.tensor([draw.getrandbits(63) * 2 + 1 - 2**63 for _ in range(_LANES)], device=device)


def _sample(tensors: list[tuple[str, Tensor]]) -> str:
    """`_SAMPLES` weights, evenly spread over all, as bfloat16: four hexadecimal digits each."""
    floats = [tensor.detach().reshape(-1) for _, tensor in tensors if tensor.is_floating_point()]
    total = sum(map(len, floats))
    places = [i * total // _SAMPLES for i in range(_SAMPLES)]
    found, begin = [], 0
    for flat in floats:
        mine = [place - begin for place in places if begin <= place < begin + len(flat)]
        if mine:
            found.append(flat[torch.tensor(mine, device=flat.device)].to(torch.bfloat16).cpu())
        begin += len(flat)
    bits = torch.cat(found).view(torch.int16).numpy()
    return "".join(f"{int(bit) & 0xFFFF:04x}" for bit in bits)


def _samples_agree(a: str, b: str) -> bool:
    """To a unit in the last place of bfloat16, or of float16 where that is coarser."""
    first, second = (_from_hex(text) for text in (a, b))
    allowed = (first.abs().maximum(second.abs()) * 2**-7).clamp(min=2**-24)
    return bool(((first - second).abs() <= allowed).all())


def _from_hex(text: str) -> Tensor:
    bits = [int(text[i : i + 4], 16) for i in range(0, len(text), 4)]
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()
