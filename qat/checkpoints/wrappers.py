"""Finds a network's state dict in what people save around it.

Training code stores a state dict under a key of its own beside epochs, optimizers and averages, and wrappers
put names in front of the network's keys or between them:

========================================  =============================================================
who                                       what it leaves behind
========================================  =============================================================
``DataParallel``, DDP                     ``module.`` in front
``torch.compile``                         ``_orig_mod.`` in front
``AveragedModel``                         ``module.`` in front, ``n_averaged``
FSDP, checkpointed activations            ``_fsdp_wrapped_module.``, ``_checkpoint_wrapped_module.`` anywhere
Lightning                                 ``state_dict``; the attribute's name in front (``model.``, ``net.``);
                                          other modules of the training beside the network
timm                                      ``state_dict``, ``state_dict_ema``
thop                                      ``total_ops`` and ``total_params`` in every module
========================================  =============================================================

Rather than listing all of them, this looks for the key of the first convolution, which every BNext has: where
it stands is a state dict of one, and what is in front of it is in front of all its keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from qat.checkpoints.tensor_checks import listed
from qat.checkpoints.unpickling import StandIn, TensorRecord, kind_of
from qat.errors import CheckpointError, nearest

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
_FIRST: Final = re.compile(rf"((?:.*\.)?)feature\.{_BETWEEN}0\.{_BETWEEN}conv1\.{_BETWEEN}weight")
_ANY: Final = re.compile(
    rf"((?:.*\.)?)(?:feature\.{_BETWEEN}\d+\..*|prelu\.{_BETWEEN}weight|fc\.{_BETWEEN}(?:weight|bias))"
)
#: Where the keys of a BNext begin.
_ROOTS: Final = frozenset({"feature", "prelu", "fc"})
#: What wrappers count, in any module.
_COUNTERS: Final = frozenset({"n_averaged", "total_ops", "total_params"})
#: Usual places of a state dict; others come behind them in the order of the file.
_USUAL: Final = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
_AVERAGE: Final = re.compile(r"(.*[._/])?(ema|swa|average|averaged|avg|shadow)([._/].*)?")
_TEACHER: Final = re.compile(r"(.*[._/])?(teacher|momentum_encoder)([._/].*)?")
#: Holds tensors under the network's keys that are no weights.
_NO_WEIGHTS: Final = re.compile(r"(optim|sched|scaler|grad|momentum|exp_avg)")
#: How deep state dicts lie: ``{"state": {"model": …}}`` is 2.
_DEPTH: Final = 4
#: Longer keys are no network's.
_LONGEST: Final = 500


@dataclass(frozen=True)
class Network:
    """A network's entry in a file.

    Attributes:
        entries: tensors, or what describes them, by the network's own keys.
        place: the keys under which the state dict stands, ``/`` between them; empty where it is the file.
        notes: what was chosen or left out, in words, for the user to read.
    """

    entries: dict[str, Any]
    place: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Copy:
    """One of the networks in a file: a state dict, and what is in front of its keys."""

    place: str
    mapping: Mapping[Any, Any]
    prefix: str
    alone: bool  # in its state dict

    @property
    def name(self) -> str:
        """Of this copy among the others in the file."""
        prefix = "" if self.alone else self.prefix.rstrip(".")
        return "/".join(part for part in (self.place, prefix) if part) or "/"

    def rank(self) -> tuple[int, int]:
        """The lowest is taken."""
        usual = self.place.rpartition("/")[2]
        order = _USUAL.index(usual) if usual in _USUAL else len(_USUAL)
        if _TEACHER.fullmatch(self.name):
            return 3, order
        if self.average:
            # An average of the parameters alone has no statistics to normalize with.
            return 0 if self._has_statistics() else 2, order
        return 1, order

    @property
    def average(self) -> bool:
        """Whether its name says that it is an average over training steps."""
        return _AVERAGE.fullmatch(self.name) is not None

    def _has_statistics(self) -> bool:
        return any(
            isinstance(key, str) and key.startswith(self.prefix) and key.endswith("running_var")
            for key in self.mapping
        )


def find_network(content: Mapping[Any, Any], key: str | None = None) -> Network:
    """The network in a file's content.

    Of several, the average over training steps (EMA, SWA) is taken, because that is what is usually evaluated
    and published; then what stands in the usual place; a teacher comes last. What was chosen is among the
    notes.

    Args:
        content: from :class:`qat.checkpoints.torch_files.TorchFile`, or tensors by key.
        key: name of the one to take, as a note lists them; ``None`` chooses.

    Raises:
        CheckpointError: there is none, none of this name, or its keys are wrapped in different ways.
    """
    copies = sorted(_copies(content), key=_Copy.rank)
    names = [copy.name for copy in copies]
    if key is not None and key not in names:
        shown = listed(sorted(names)) or "none"
        raise CheckpointError(f"model.state_key: found {key!r}, the file has: {shown}{nearest(key, names)}")
    if not copies:
        refuse_model(content)
        return _without_first_convolution(content)
    chosen = copies[0] if key is None else copies[names.index(key)]
    notes = []
    if len(copies) > 1:
        why = ", an average, as is usual for evaluation" if chosen.average and key is None else ""
        others = listed([name for name in names if name != chosen.name])
        notes.append(
            f"its weights are those of {listed([chosen.name])}{why}; it also holds {others} "
            "(model.state_key takes another)"
        )
    entries, left_out = _sorted_out(
        chosen, {copy.prefix for copy in copies if copy.mapping is chosen.mapping}
    )
    return Network(entries, chosen.place, (*notes, *left_out))


def with_batch_counts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with a count of 0 where a normalization lacks its count of batches, as old torch wrote them."""
    filled = dict(state)
    for key in state:
        if key.endswith(".running_var"):
            filled.setdefault(key.removesuffix("running_var") + "num_batches_tracked", torch.tensor(0))
    return filled


def is_tensor(value: object) -> bool:
    """Whether it is a tensor, or describes one."""
    return isinstance(value, Tensor | TensorRecord)


def _copies(content: Mapping[Any, Any]) -> Iterator[_Copy]:
    for place, mapping in _mappings(content):
        found = (
            _FIRST.fullmatch(key)
            for key, value in mapping.items()
            if isinstance(key, str) and len(key) <= _LONGEST and is_tensor(value)
        )
        prefixes = list(dict.fromkeys(match[1] for match in found if match))
        for prefix in prefixes:
            yield _Copy(place, mapping, prefix, len(prefixes) == 1)


def _mappings(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """All dictionaries that could be a state dict, each once, the outer before the inner."""
    seen = {id(content)}
    level: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    for _ in range(_DEPTH):
        yield from level
        inner = []
        for place, mapping in level:
            for key, value in mapping.items():
                if not isinstance(key, str) or not isinstance(value, Mapping) or id(value) in seen:
                    continue
                if len(key) <= _LONGEST and not _NO_WEIGHTS.search(key):
                    seen.add(id(value))
                    inner.append((f"{place}/{key}" if place else key, value))
        level = inner


def _sorted_out(chosen: _Copy, prefixes: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The network's entries by its own keys, and notes on what was left out.

    Args:
        chosen: the network.
        prefixes: of all networks in its state dict.

    Raises:
        CheckpointError: some of its keys are wrapped in another way than the others.
    """
    mapping, prefix = chosen.mapping, chosen.prefix
    entries: dict[str, Any] = {}
    named: dict[str, str] = {}
    counters: dict[str, int] = {}
    others: list[str] = []
    odd: list[str] = []
    for key, value in mapping.items():
        text = key if isinstance(key, str) else str(key)[:100]
        last = text.rpartition(".")[2]
        inner = text[len(prefix) :].split(".") if text.startswith(prefix) else [""]
        if last in _COUNTERS:
            counters[last] = counters.get(last, 0) + 1
        elif inner[0] in _ROOTS:
            name = ".".join(part for part in inner if part not in _WRAPPERS)
            if name in entries:
                raise _half_wrapped(chosen.place, [named[name]], [text])
            entries[name], named[name] = value, text
        elif _is_odd(text, prefix, prefixes):
            odd.append(text)
        else:
            others.append(text)
    if odd:
        raise _half_wrapped(chosen.place, list(named.values()), odd)
    notes = []
    if others:
        modules = list(dict.fromkeys(key.removeprefix(prefix).partition(".")[0] for key in others))
        notes.append(f"left out: {_count(others, 'entry', 'entries')} of other modules ({listed(modules)})")
    if counters:
        total = sum(counters.values())
        notes.append(
            f"left out: {total} {'counter' if total == 1 else 'counters'} of wrappers ({listed([*counters])})"
        )
    return entries, notes


def _is_odd(key: str, prefix: str, prefixes: Collection[str]) -> bool:
    """Whether ``key`` is of the network, but has something else in front than the first convolution has."""
    found = _ANY.fullmatch(key[:_LONGEST])
    if found is None or found[1] in prefixes:
        return False
    return {*found[1].split(".")[:-1]} <= _SELF | {*prefix.split(".")}


def _half_wrapped(place: str, keys: list[str], odd: list[str]) -> CheckpointError:
    """What to say of ``keys`` and ``odd``, which all belong to the network; the fewer are the odd ones."""
    if len(odd) > len(keys):
        keys, odd = odd, keys
    found = _ANY.fullmatch(keys[0][:_LONGEST])
    prefix = found[1] if found else ""
    rest = f"begin with {listed([prefix])}" if prefix else "have nothing in front"
    where = f"{listed([place])}: " if place else ""
    return CheckpointError(
        f"{where}its keys are wrapped in different ways: {_count(keys, 'key', 'keys')} of the network {rest}, "
        f"unlike {_count(odd, 'key', 'keys')}: {listed(odd)}; give all the same prefix, or none, and save again"
    )


def _without_first_convolution(content: Mapping[Any, Any]) -> Network:
    """What comes nearest to a network, for the message about what it lacks."""
    for place, mapping in _mappings(content):
        if any(map(is_tensor, mapping.values())) or place == "state_dict":
            found, where = mapping, place
            break
    else:
        found, where = content, ""
    prefix = "module."
    wrapped = [isinstance(key, str) and key.startswith(prefix) for key in found]
    if any(wrapped) and not all(wrapped):
        half = next(key for key, has in zip(found, wrapped, strict=True) if not has)
        raise CheckpointError(
            f"some keys have the prefix {prefix!r} and some don't, such as {listed([str(half)[:100]])}"
        )
    if wrapped and all(wrapped):
        found = {key.removeprefix(prefix): value for key, value in found.items()}
    return Network(dict(found), where)


def refuse_model(content: object) -> None:
    """Say what to do about a whole model that was pickled, if ``content`` is or holds one.

    Raises:
        CheckpointError: it is or does.
    """
    for place, mapping in _mappings(content) if isinstance(content, Mapping) else ():
        if (
            isinstance(mapping, StandIn)
            and isinstance(mapping.state, Mapping)
            and "_modules" in mapping.state
        ):
            where = f"{listed([place])}: " if place else ""
            raise CheckpointError(
                f"{where}holds a whole model ({listed([kind_of(mapping)[:100]])}), which can't be read without "
                "running the code it comes from; save its weights alone: torch.save(model.state_dict(), …)"
            )


def _count(things: list[str], one: str, many: str) -> str:
    return f"{len(things)} {one if len(things) == 1 else many}"
