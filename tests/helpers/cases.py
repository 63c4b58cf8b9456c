"""Parameters of a test that cost more time than the others: ``slow(1, 2)`` stands where ``(1, 2)`` would."""

from __future__ import annotations

import functools

import pytest

#: Runs at each landing (`make test-all`), not in `make test`.
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
#: Runs in `make test-nightly` alone.
exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
