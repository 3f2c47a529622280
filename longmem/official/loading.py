"""Parameters of the published code: names, files, and the model built from them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longmem.backbones.layers import DecoderLayer
from longmem.files import naming

from .model import OfficialConfig, OfficialLongMem

_GPT = "decoder.pretrained_model.decoder.model."
# Names under which the published model shows a parameter a second time.
_ALIASES = {
    f"{_GPT}transformer.wte.weight": "decoder.embed_tokens.weight",
    "decoder.output_projection.weight": f"{_GPT}lm_head.weight",
}
_NAMED = 10  # of what is wrong
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}


def load_official(
    state: Mapping[str, Any] | str | Path,
    config: OfficialConfig | Mapping[str, Any],
    *,
    storage: torch.dtype = torch.float32,
) -> OfficialLongMem:
    """Build the published model from its parameters, in float32.

    Args:
        state: official parameter names -> tensors, or a fairseq checkpoint that holds them under "model", as a
            dictionary or as a file. No code from a file is run.
        config: sizes under the official names (`OfficialConfig`); other keys of a dictionary are ignored.
        storage: what memory keys and values are stored in, float32 or float16.

    Raises:
        ValueError: parameters that are missing, not of this model, of another shape, or given twice with different
            values, the first ten in one message; a file that cannot be read safely.
    """
    if not isinstance(config, OfficialConfig):
        config = OfficialConfig.from_dict(config)
    given = read_checkpoint(state) if isinstance(state, (str, Path)) else _unwrap(state)
    model = OfficialLongMem(config, storage=storage)
    wanted = official_parameters(model)
    wrong = []
    for alias, name in _ALIASES.items():
        if alias in given and not _equal(given[alias], given.setdefault(name, given[alias])):
            wrong.append(f"differs from {name}, whose other name it is: {alias}")
    wrong += [f"missing: {name} {tuple(p.shape)}" for name, p in wanted.items() if name not in given]
    wrong += [f"not of this model: {name}" for name in given if name not in wanted and name not in _ALIASES]
    for name in wanted.keys() & given.keys():
        if given[name].shape != wanted[name].shape:
            got, shape = tuple(given[name].shape), tuple(wanted[name].shape)
            wrong.append(f"wrong shape: {name} must be {shape}, got {got}")
    if wrong:
        file = f"{state}: " if isinstance(state, (str, Path)) else ""
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        listed = "; ".join(sorted(wrong)[:_NAMED]) + more
        raise ValueError(f"{file}load_official: the parameters do not fit the configuration: {listed}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(given[name])
    return model


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float(), b.float())


def official_state(model: OfficialLongMem) -> dict[str, Tensor]:
    """The model's parameters under all their official names, as the published code saves them under "model"."""
    state = {name: parameter.detach() for name, parameter in official_parameters(model).items()}
    return state | {alias: state[name] for alias, name in _ALIASES.items()}


def official_parameters(model: OfficialLongMem) -> dict[str, nn.Parameter]:
    """Official name -> parameter, each once."""
    backbone = model.backbone
    named: dict[str, Any] = {
        "decoder.embed_tokens": backbone.embed,
        f"{_GPT}transformer.ln_f": backbone.norm,
        f"{_GPT}lm_head": backbone.head,
        "decoder.layer_norm": model.norm,
    }
    for i in range(len(backbone.layers)):
        named |= _layer(backbone.layer(i), f"{_GPT}transformer.h.{i}", "attn", "mlp.fc_in", "mlp.fc_out")
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        named |= _layer(layer, f"decoder.layers.{i}", "self_attn", "fc1", "fc2")
    parameters = {
        f"{prefix}.{name}": parameter
        for prefix, module in named.items()
        for name, parameter in module.named_parameters()
    }
    memory_layer = f"decoder.layers.{model.config.memory_layer}"
    return parameters | {f"{memory_layer}.self_attn.memory_bias": model.memory_bias}


def _layer(layer: DecoderLayer, name: str, attention: str, first: str, second: str) -> dict[str, nn.Module]:
    assert isinstance(layer.mlp, nn.Sequential)
    modules = {f"{name}.ln_1": layer.input_norm, f"{name}.{first}": layer.mlp[0], f"{name}.{second}": layer.mlp[2]}
    return modules | {f"{name}.{attention}.{theirs}": getattr(layer, ours) for ours, theirs in _ATTENTION.items()}


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The parameters in a fairseq checkpoint file. Reads tensors, plain values and argparse namespaces, nothing else.

    Raises:
        ValueError: there is no such file, it refers to anything else, or it holds no parameters.
    """
    if not Path(path).is_file():
        raise ValueError(f"load_official: there is no file {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any type: a damaged file is a program for the unpickler that goes wrong anywhere
        # Of PyTorch's long message, which also advises to run the code, only what the file asked for.
        asked = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
        reason = asked[0] if asked else "it is damaged, or no file of PyTorch's"
        raise ValueError(f"load_official: {path} was not read: {reason}") from None
    with naming(str(path)):
        return _unwrap(content)


def _unwrap(state: Any) -> dict[str, Tensor]:
    """Parameters out of the wrapper, if there is one, without the buffers of the published modules."""
    if not isinstance(state, Mapping):
        raise ValueError(f"load_official: wanted a dictionary of parameters, got {type(state).__name__}")
    inner = state["model"] if isinstance(state.get("model"), Mapping) else state
    tensors = {name: value for name, value in inner.items() if not (isinstance(name, str) and _is_buffer(name))}
    strange = [name for name, value in tensors.items() if not (isinstance(name, str) and _is_parameter(value))]
    if strange or not tensors:
        named = ", ".join(map(repr, strange[:3])) + (f" and {len(strange) - 3} more" if len(strange) > 3 else "")
        raise ValueError(f"load_official: wanted a dictionary of parameters, got {named or 'nothing'}")
    return tensors


def _is_parameter(value: Any) -> bool:
    """True for numbers in memory: a file may also hold tensors that are sparse, of integers, or empty shells."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"
    return dense and value.is_floating_point()


def _is_buffer(name: str) -> bool:
    return name == "decoder.version" or name.endswith((".attn.bias", ".attn.masked_bias"))
