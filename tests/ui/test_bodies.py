"""Images in JSON requests: base64 as written by mail programs, shells and browsers."""

import base64
import textwrap
from urllib.parse import quote

import pytest

from histoseek.errors import BadInput
from histoseek.ui.api.bodies import pixels_of, validation_text

BLOB = bytes(range(256)) * 3
TEXT = base64.b64encode(BLOB).decode()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        base64.encodebytes(BLOB).decode(),
        "\r\n".join(textwrap.wrap(TEXT, 64)) + "\r\n",
        f"  {TEXT}\n",
        f"data:image/png;base64,{TEXT}",
        f"data:image/png;name=a.png;base64,\n{base64.encodebytes(BLOB).decode()}",
        f"DATA:image/jpeg;BASE64,{quote(TEXT, safe='')}",
    ],
)
def test_base64_is_read_with_line_breaks_and_in_data_urls(text):
    assert pixels_of(text) == BLOB


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not base64!", "not valid base64"),
        (TEXT[:-1] + "é", "not valid base64"),
        (TEXT[:-3], "not valid base64"),
        ("data:image/png,%89PNG", "';base64,'"),
        ("data:image/png;base64", "';base64,'|not valid base64"),
    ],
)
def test_other_texts_are_refused(text, says):
    with pytest.raises(BadInput, match=says):
        pixels_of(text)


def test_a_validation_error_names_its_field_if_it_has_one():
    errors = [{"loc": ("k",), "msg": "too large"}, {"loc": (), "msg": "Invalid JSON"}]
    assert validation_text(errors) == "k: too large; Invalid JSON"
