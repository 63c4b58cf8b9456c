"""Finds a network among all that people save beside it: epochs, optimizers, averages, teachers.

A state dict can stand under any key. It is known by the key of the first convolution, which every BNext has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qat.checkpoints.pickle_values import StandIn, is_tensor, kind_of
from qat.checkpoints.tensor_checks import listed
from qat.checkpoints.wrappers import LONGEST_KEY, prefixes_in, unwrapped
from qat.errors import CheckpointError, nearest

#: Usual places of a state dict; others come behind them in the order of the file.
_USUAL: Final = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
_AVERAGE: Final = re.compile(r"(.*[._/])?(ema|swa|average|averaged|avg|shadow)([._/].*)?")
_TEACHER: Final = re.compile(r"(.*[._/])?(teacher|momentum_encoder)([._/].*)?")
#: Holds tensors under the network's keys that are no weights.
_NO_WEIGHTS: Final = re.compile(r"(optim|sched|scaler|grad|momentum|exp_avg)")
#: How deep state dicts lie: ``{"state": {"model": …}}`` is 2.
_DEPTH: Final = 4


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
    if len(copies) > 1 and key is None:
        why = ", an average, as is usual for evaluation" if chosen.average else ""
        others = listed([name for name in names if name != chosen.name])
        notes.append(
            f"its weights are those of {listed([chosen.name])}{why}; it also holds {others} "
            "(model.state_key takes another)"
        )
    prefixes = {copy.prefix for copy in copies if copy.mapping is chosen.mapping}
    entries, left_out = unwrapped(chosen.mapping, chosen.prefix, prefixes)
    return Network(entries, chosen.place, (*notes, *left_out))


def _copies(content: Mapping[Any, Any]) -> Iterator[_Copy]:
    for place, mapping in _mappings(content):
        prefixes = prefixes_in(mapping)
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
                if len(key) <= LONGEST_KEY and not _NO_WEIGHTS.search(key):
                    seen.add(id(value))
                    inner.append((f"{place}/{key}" if place else key, value))
        level = inner


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
                f"{where}holds a whole model ({listed([kind_of(mapping)[:100]])}), which takes "
                "the code it comes from to read; save its weights alone: torch.save(model.state_dict(), …)"
            )
