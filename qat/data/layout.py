"""Which folders or files of a data set are its splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from qat.data.split import SplitName
from qat.errors import DataError
from qat.recipe.schema import Data

__all__ = ["HELD_OUT", "HERE", "Layout", "find_layout", "is_split_word"]

#: Name of the training split of a data set without splits: the folder of classes is the root itself.
HERE: Final = "."
#: Share of each class that is held out for validation where ``data.validation_share`` is unset.
HELD_OUT: Final = 0.2
#: Spellings of one split, the usual one first; upper and lower case are the same.
_SPELLINGS: Final = (("train", "training"), ("validation", "val", "valid"), ("test", "testing"))


@dataclass(frozen=True)
class Layout:
    """Names of the splits of a data set, which need not exist where they were given.

    Attributes:
        train: images to train on; :data:`HERE` where they are all that there is.
        evaluated: those that epochs are chosen on; ``None``: the share ``share`` of ``train``.
        share: of each class, held out of ``train``; ``None``: nothing is.
        final: those that the chosen network is measured on in the end; ``None``: no others.
        notes: sentences on what was chosen for the user.
    """

    train: str
    evaluated: str | None
    share: float | None = None
    final: str | None = None
    notes: tuple[str, ...] = ()

    def key(self, name: SplitName) -> str:
        """The key of ``data`` that names a split."""
        return f"{'train' if name == 'train' else 'test' if name == 'test' else 'final'}_split"

    def of(self, name: SplitName) -> str | None:
        """The name of a split; ``None`` where it is held out of the training split, or there is none."""
        return {"train": self.train, "test": self.evaluated, "final": self.final}[name]

    def called(self, name: SplitName) -> str:
        """What messages and files call a split."""
        found = self.of(name)
        if found is None:
            what = "" if self.train == HERE else f" of {self.train}"
            return f"{100 * (self.share or 0):.4g} % held out{what}"
        return "the rest" if found == HERE else found


def is_split_word(name: str) -> bool:
    """Whether ``name`` is a usual name of a split."""
    return any(name.casefold() in words for words in _SPELLINGS)


def find_layout(
    data: Data,
    present: Sequence[str],
    source: object,
    *,
    exists: Callable[[str], bool],
    misfit: Callable[[str, str], str | None],
    flat: bool,
) -> Layout:
    """The splits that a recipe names, in the spelling that they have, or those that are there.

    Args:
        data: ``train_split``, ``test_split``, ``final_split`` and ``validation_share`` are looked at.
        present: names of all splits there are.
        source: what errors call the data set.
        exists: whether there is a split, which a path may name, too.
        misfit: why the second split has not the classes of the first, in words; ``None`` where it has.
        flat: whether all of ``present`` may be classes, where none has the name of a split.

    Raises:
        DataError: two spellings of the same split, or a share beside a validation split.
    """

    def spelled(name: str) -> str | None:
        """The split that ``name`` means, as it is spelled here."""
        if exists(name):
            return name
        words = next((words for words in _SPELLINGS if name.casefold() in words), ())
        found = [one for word in words for one in present if one.casefold() == word]
        if len(found) > 1:
            raise DataError(
                f"{source}: {name!r} could be {' or '.join(map(repr, found))}; name the one with --set "
                "data.train_split, data.test_split or data.final_split"
            )
        return found[0] if found else None

    train = spelled(data.train_split)
    if train is None and flat and (data.train_split, data.test_split) == ("train", None):
        train = HERE if present and not any(map(is_split_word, present)) else None
    if train == HERE and data.test_split is None:
        return Layout(HERE, None, data.validation_share or HELD_OUT, data.final_split)
    named = train or data.train_split
    notes: list[str] = []

    def fitting_test() -> str | None:
        """A split 'test' that has the classes of the training split; what it is, if not, is noted."""
        test = spelled("test")
        if test is None or train is None or (why := misfit(train, test)) is None:
            return test
        notes.append(f"{source}: {test!r} is left aside: {why}")
        return None

    share = data.validation_share
    evaluated: str | None
    final: str | None
    if data.test_split is not None:
        evaluated = spelled(data.test_split) or data.test_split
    else:
        evaluated = spelled("validation")
        if share is not None and evaluated is not None:
            raise DataError(
                f"data.validation_share: found {share}, but {source} has a split {evaluated!r}; leave "
                "data.validation_share out"
            )
        if share is None and evaluated is None:
            evaluated = fitting_test()
            if evaluated is not None:
                notes.append(_on_test(evaluated, named))
            elif train is None:
                evaluated = "validation"  # whoever looks for it says that it is missing
    if data.final_split is not None:
        final = spelled(data.final_split) or data.final_split
    else:
        final = None if evaluated is not None and evaluated == spelled("test") else fitting_test()
    return Layout(
        named,
        evaluated,
        None if evaluated is not None else share or HELD_OUT,
        None if final == evaluated else final,
        tuple(dict.fromkeys(notes)),
    )


def _on_test(evaluated: str, train: str) -> str:
    return (
        f"epochs are chosen on {evaluated!r}, as there is no validation split, so its accuracy is a little "
        f"too good; --set data.validation_share={HELD_OUT} holds images out of {train!r} instead"
    )
