"""What every exported model says about itself."""

from __future__ import annotations

import pytest
from qat_export.graphs.metadata import kind_of_input


def test_the_kind_of_input_is_named_by_type_and_layout() -> None:
    assert kind_of_input("uint8", "NHWC") == "uint8 NHWC"
    assert kind_of_input("float32", "NCHW") == "float32 NCHW"
    with pytest.raises(ValueError, match="float32 and layout NHWC"):
        kind_of_input("float32", "NHWC")
