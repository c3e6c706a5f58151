"""Error messages name the package to install."""

import math

import pytest

from histoseek.errors import MissingPart, need


def test_an_optional_module_is_imported_or_its_extra_is_named():
    assert need("math", "cpu") is math
    with pytest.raises(MissingPart, match=r"no_such_part .*pip install 'histoseek\[gpu\]'"):
        need("no_such_part", "gpu")
