"""Takes off what wrappers put in front of a network's keys, between them and beside them.

========================================  =============================================================
who                                       what it leaves behind
========================================  =============================================================
``DataParallel``, DDP                     ``module.`` in front
``torch.compile``                         ``_orig_mod.`` in front
``AveragedModel``                         ``module.`` in front, ``n_averaged``
FSDP, checkpointed activations            ``_fsdp_wrapped_module.`` and the like, anywhere
Lightning                                 ``state_dict``; an attribute's name in front (``model.``);
                                          other modules of the training beside the network
timm                                      ``state_dict``, ``state_dict_ema``
thop                                      ``total_ops`` and ``total_params`` in every module
========================================  =============================================================

Rather than listing all names that can stand in front, this looks for the key of the first convolution, which
every BNext has: what is in front of it must be in front of all other keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from qat.checkpoints.pickle_values import is_tensor
from qat.checkpoints.tensor_checks import listed
from qat.errors import CheckpointError

#: Names that wrappers put in front of a module's keys, and between them where they wrap a part.
_WRAPPERS: Final = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)
#: Names that stand for the network itself rather than for another module beside it.
_SELF: Final = frozenset({*_WRAPPERS, "model", "net", "network"})
_BETWEEN: Final = rf"(?:(?:{'|'.join(_WRAPPERS)})\.)*"
#: What is in front of the first convolution, and of any key of the network.
_FIRST: Final = re.compile(rf"((?:.*\.)?)feature\.{_BETWEEN}0\.{_BETWEEN}conv1\.{_BETWEEN}weight")
_ANY: Final = re.compile(
    rf"((?:.*?\.)??)(?:feature\.{_BETWEEN}\d+\..*|prelu\.{_BETWEEN}weight|fc\.{_BETWEEN}(?:weight|bias))"
)
#: Where the keys of a BNext begin.
_ROOTS: Final = frozenset({"feature", "prelu", "fc"})
#: What wrappers count, in any module.
_COUNTERS: Final = frozenset({"n_averaged", "total_ops", "total_params"})
#: Each is looked at in whole, and no real file has as many.
_MOST_NETWORKS: Final = 100
#: Longer keys are no network's.
LONGEST_KEY: Final = 500


def prefixes_in(mapping: Mapping[Any, Any]) -> list[str]:
    """What is in front of the first convolution, for each network in a state dict; in order, at most 100."""
    found = (
        _FIRST.fullmatch(key)
        for key, value in mapping.items()
        if isinstance(key, str) and len(key) <= LONGEST_KEY and is_tensor(value)
    )
    return list(dict.fromkeys(match[1] for match in found if match))[:_MOST_NETWORKS]


def unwrapped(
    mapping: Mapping[Any, Any], prefix: str, prefixes: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """A network's entries by its own keys, and notes on what was left out.

    Args:
        mapping: a state dict.
        prefix: what is in front of the network's keys.
        prefixes: of all networks in the state dict.

    Raises:
        CheckpointError: some of its keys are wrapped in another way than the others.
    """
    entries: dict[str, Any] = {}
    named: dict[str, str] = {}
    others: list[str] = []
    odd: list[str] = []
    for key, value in mapping.items():
        text = key if isinstance(key, str) else str(key)[:100]
        last = text.rpartition(".")[2]
        inner = text[len(prefix) :].split(".") if text.startswith(prefix) else [""]
        if last in _COUNTERS:
            continue
        if inner[0] in _ROOTS:
            name = ".".join(part for part in inner if part not in _WRAPPERS)
            if name in entries:
                raise _half_wrapped([named[name]], [text])
            entries[name], named[name] = value, text
        elif (found := _ANY.fullmatch(text[:LONGEST_KEY])) is None or found[1] not in prefixes:
            (odd if found and _is_own(found[1], prefix) else others).append(text)
    if odd:
        raise _half_wrapped(list(named.values()), odd)
    notes = []
    if others:
        modules = list(dict.fromkeys(key.removeprefix(prefix).partition(".")[0] for key in others))
        notes.append(f"left out: {_count(others, 'entry', 'entries')} of other modules ({listed(modules)})")
    return entries, notes


def _is_own(front: str, prefix: str) -> bool:
    """Whether what is in front of a key may stand for the network whose first convolution has ``prefix``."""
    return {*front.split(".")[:-1]} <= _SELF | {*prefix.split(".")}


def _half_wrapped(keys: list[str], odd: list[str]) -> CheckpointError:
    """What to say of ``keys`` and ``odd``, which all belong to the network; the fewer are the odd ones."""
    if len(odd) > len(keys):
        keys, odd = odd, keys
    found = _ANY.fullmatch(keys[0][:LONGEST_KEY])
    prefix = found[1] if found else ""
    most = f"{len(keys)} {'begins' if len(keys) == 1 else 'begin'} with {listed([prefix])!r}"
    if not prefix:
        most = f"{len(keys)} {'has' if len(keys) == 1 else 'have'} nothing in front"
    return CheckpointError(
        f"the network's keys are half wrapped: {most}, {len(odd)} {'is' if len(odd) == 1 else 'are'} unlike "
        f"that: {listed(odd)}; rename them, so that all have the same in front"
    )


def with_batch_counts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with a count of 0 where a normalization has none of its batches, as in files of old torch."""
    filled = dict(state)
    for key in state:
        if key.endswith(".running_var"):
            filled.setdefault(key.removesuffix("running_var") + "num_batches_tracked", torch.tensor(0))
    return filled


def _count(things: list[str], one: str, many: str) -> str:
    return f"{len(things)} {one if len(things) == 1 else many}"
