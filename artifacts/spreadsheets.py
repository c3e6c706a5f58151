"""Makes cells of CSV and TSV files safe to open in Excel or LibreOffice.

There, a cell that begins with ``=``, ``+``, ``-`` or ``@`` is a formula, which can send data away or start
programs. Labels and file names are untrusted, so such cells get a leading apostrophe.
"""

from __future__ import annotations

import re
from typing import Any

STARTS = "=+-@\t\r\n"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def inert(value: Any) -> Any:
    """Return a text that no spreadsheet reads as a formula; numbers are returned unchanged."""
    if isinstance(value, str) and value[:1] in STARTS and value and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value
