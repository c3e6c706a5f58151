"""Cells of CSV and TSV files that people open in Excel or LibreOffice.

A cell that begins with ``=``, ``+``, ``-`` or ``@`` is a formula there, which can send data away or start
programs. Labels and file names come from others, so such cells get an apostrophe in front.
"""

from __future__ import annotations

import re
from typing import Any

STARTS = "=+-@\t\r\n"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def inert(value: Any) -> Any:
    """Return a text that no spreadsheet takes for a formula; numbers stay as they are."""
    if isinstance(value, str) and value[:1] in STARTS and value and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value
