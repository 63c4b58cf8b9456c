"""Image data sets of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from qat.data.columns import Columns, TableImages, find_columns
from qat.data.labels import integer_names, labels_of, text_names
from qat.data.paths import VARIABLE, split_of
from qat.data.problems import Problem
from qat.data.quiet_datasets import quiet_datasets
from qat.data.split import Split, SplitName
from qat.data.stream import StreamedSplit
from qat.data.table import TableSplit, without_broken
from qat.errors import DataError
from qat.recipe.schema import Data

if TYPE_CHECKING:
    import datasets

__all__ = ["load_hub_split"]

CIFAR10: Final = "uoft-cs/cifar10"
#: Seconds after which the Hub counts as unreachable, and its cache on this machine is used.
_TIMEOUT: Final = 10.0
#: Most characters of an error's message that are repeated in another message.
_LONGEST_REASON: Final = 300


@dataclass(frozen=True)
class _Repository:
    """A data set of the Hub.

    Attributes:
        name: name of the repository.
        config: the recipe's ``data.config``.
        revision: the recipe's ``data.revision``.
        commit: the commit that ``revision`` means now; ``None`` if the Hub couldn't be reached.
        trouble: message for the case that the Hub couldn't be reached and its cache lacks the data set.
    """

    name: str
    config: str | None
    revision: str | None
    commit: str | None
    trouble: str = ""

    def load(self, key: str, split: str, **options: Any) -> Any:
        """Call `datasets.load_dataset` for one split.

        Args:
            key: key of the recipe that names the split, for messages.
            split: name of the split.
            **options: further arguments of `datasets.load_dataset`.

        Raises:
            DataError: neither the Hub nor its cache on this machine has the split.
        """
        import datasets  # imported here: it takes two seconds

        revision = self.commit or self.revision
        try:
            with quiet_datasets(offline=self.commit is None):
                return datasets.load_dataset(
                    self.name, self.config, split=split, revision=revision, **options
                )
        # Exceptions of `datasets`, its file systems, the HTTP library and Arrow have no common base class.
        except Exception as error:
            if self.commit is None:
                raise DataError(self.trouble) from error
            raise DataError(f"data.{key}: {split!r} of {self.name} on the Hub: {_reason(error)}") from error


def load_hub_split(data: Data, name: SplitName, problems: list[Problem] | None = None) -> Split:
    """One split of the repository ``data.name`` or CIFAR-10's; see :func:`qat.data.loading.load_split`.

    With ``data.streaming`` the training split is not downloaded. The test split always is, because its labels
    must be known in a fixed order.
    """
    repository = _find(data)
    key, split = split_of(data, name)
    if data.streaming and name == "train":
        return _streamed(data, repository, key, split)
    table = _stored(data, repository, key, split)
    source = f"{repository.name} ({split})"
    columns = find_columns(table.features, data.image_column, data.label_column, source)
    if not len(table):
        raise DataError(f"{source}: holds no images")
    if columns.class_names is None:
        if data.streaming:
            raise DataError(_unnamed(source, columns))
        other_key, other = split_of(data, "test" if name == "train" else "train")
        beside = _stored(data, repository, other_key, other)
        both = {source: table, f"{repository.name} ({other})": beside}
        if columns.kind == "texts":
            known = table if name == "train" else beside
            columns = replace(columns, class_names=text_names([_column(known, columns)], columns, source))
    labels = labels_of(_column(table, columns), columns, source)
    names: Sequence[str] | None = columns.class_names
    if names is None:
        names = integer_names([labels_of(_column(part, columns), columns, one) for one, part in both.items()])
    images = TableImages(table, columns.image, [(source, len(table))])
    left_out = None
    if problems is None and data.on_error == "skip":
        images, labels, left_out = without_broken(images, labels, data.exif_orientation, split)
    found = TableSplit(
        images,
        names,
        labels,
        resize=data.shorter_side,
        side=data.loaded_side("train" if name == "train" else "test"),
        workers=data.workers,
        in_memory=data.in_memory,
        turn=data.exif_orientation,
    )
    found.name, found.left_out = split, left_out
    return found


def _find(data: Data) -> _Repository:
    """The repository at the commit that ``data.revision`` means now, or without a commit if the Hub is down.

    Raises:
        DataError: the Hub has no such repository or revision, or doesn't give this user access to it.
    """
    from huggingface_hub import HfApi, errors

    name = CIFAR10 if data.dataset == "cifar10" else data.name
    assert name is not None  # the schema requires it
    try:
        found = HfApi().dataset_info(name, revision=data.revision, timeout=_TIMEOUT)
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        if not _server_trouble(error):
            raise DataError(f"data.name: {name!r} is not to be had from the Hub: {_reason(error)}") from error
        return _unreachable(data, name, error)
    except Exception as error:  # from the HTTP library: there is no network, or the Hub is down
        return _unreachable(data, name, error)
    return _Repository(name, data.config, data.revision, found.sha)


def _server_trouble(error: Exception) -> bool:
    """Whether the Hub answered with a server error (status 500 or above), so that the cache is to be used."""
    response = getattr(error, "response", None)
    return bool(getattr(response, "status_code", 0) >= 500)


def _unreachable(data: Data, name: str, error: Exception) -> _Repository:
    """The repository without a commit, with a message that says why and what else the user can do."""
    if data.dataset == "cifar10":
        what = (
            f"data.root is unset, {VARIABLE} names no folder with a folder 'cifar10', and the Hugging Face "
            f"Hub cannot be reached for {name}: {_reason(error)}; name the folder of train.parquet and "
            f"test.parquet with --set data.root=DIR, or the one above 'cifar10' with {VARIABLE}=DIR"
        )
    else:
        what = (
            f"data.name: {name} is not on this machine, and the Hugging Face Hub cannot be reached: "
            f"{_reason(error)}; Parquet files are read with --set data.dataset=parquet --set data.root=DIR, "
            f"where DIR may lie in the folder that {VARIABLE} names"
        )
    return _Repository(name, data.config, data.revision, None, what)


def _stored(data: Data, repository: _Repository, key: str, split: str) -> datasets.Dataset:
    """A split that is stored on this machine's disk.

    `datasets` usually downloads every split of a repository. With ``data.streaming`` the split is streamed to
    the disk instead, so that nothing else is downloaded.
    """
    if not data.streaming:
        return repository.load(key, split)
    import datasets

    stream = _undecoded(data, repository, repository.load(key, split, streaming=True), split)[0]
    with quiet_datasets():
        try:
            return datasets.Dataset.from_generator(
                _rows, features=stream.features, gen_kwargs={"stream": stream}
            )
        except Exception as error:  # there is no common base class, see `_Repository.load`
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise DataError(f"data.{key}: {split!r} of {repository.name}: {_reason(cause)}") from error


def _rows(stream: datasets.IterableDataset) -> Any:
    yield from stream


def _undecoded(
    data: Data, repository: _Repository, stream: datasets.IterableDataset, split: str
) -> tuple[datasets.IterableDataset, Columns]:
    """The image and label columns of ``stream``, with images as encoded bytes."""
    import datasets

    source = f"{repository.name} ({split})"
    if stream.features is None:
        raise DataError(f"{source}: does not say what its columns hold; set data.streaming=false")
    columns = find_columns(stream.features, data.image_column, data.label_column, source)
    chosen = stream.select_columns([columns.image, columns.label])
    if isinstance(stream.features[columns.image], datasets.Image):
        chosen = chosen.cast_column(columns.image, datasets.Image(decode=False))
    return chosen, columns


def _streamed(data: Data, repository: _Repository, key: str, split: str) -> StreamedSplit:
    stream, columns = _undecoded(data, repository, repository.load(key, split, streaming=True), split)
    source = f"{repository.name} ({split})"
    if columns.class_names is None:
        raise DataError(_unnamed(source, columns))
    splits = stream.info.splits or {}
    count = splits[split].num_examples if split in splits else None
    if not count:
        raise DataError(
            f"{source}: does not say how many images it has, which a schedule needs; set data.streaming=false"
        )
    return StreamedSplit(
        stream,
        columns,
        columns.class_names,
        count,
        source=source,
        identity="\0".join(map(str, (repository.name, repository.commit, repository.config, split, columns))),
        resize=data.shorter_side,
        side=data.loaded_side("train"),
        workers=data.workers,
        shuffle_buffer=data.shuffle_buffer,
        turn=data.exif_orientation,
    )


def _column(table: datasets.Dataset, columns: Columns) -> Any:
    """The labels as Arrow has them."""
    return table.select_columns(columns.label).with_format("arrow")[:][columns.label]


def _unnamed(source: str, columns: Columns) -> str:
    what = "texts" if columns.kind == "texts" else "integers without class names"
    return (
        f"{source}: column {columns.label!r} holds {what}, whose number is only known "
        "once all are read; set data.streaming=false"
    )


def _reason(error: Exception) -> str:
    """An error's message in one line, cut after 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
