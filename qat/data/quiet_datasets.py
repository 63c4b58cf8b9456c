"""Hugging Face `datasets` without its progress bars, its log lines and its download counter."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_datasets(*, offline: bool = False) -> Iterator[None]:
    """No progress bars, and no request to Hugging Face's download counter, which ``load_dataset`` makes.

    ``offline``: nothing is asked of the Hub, so that what is not in its cache is missing at once.
    """
    import datasets  # imported here: it takes two seconds
    from huggingface_hub import constants

    config = datasets.config
    bars, counts = not datasets.are_progress_bars_disabled(), config.HF_UPDATE_DOWNLOAD_COUNTS
    modes = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    if offline:
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = modes
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if bars:
            datasets.enable_progress_bars()
