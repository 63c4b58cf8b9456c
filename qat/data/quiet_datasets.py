"""Calls Hugging Face `datasets` without its progress bars, log lines and download counter."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_datasets(*, offline: bool = False) -> Iterator[None]:
    """Context in which `datasets` shows no progress bars, logs nothing, and counts no downloads at the Hub.

    Args:
        offline: whether to make no requests to the Hub, so that a data set which isn't in the cache fails at
            once.
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
