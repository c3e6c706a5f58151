"""Tables as Excel, LibreOffice, pandas and R write them."""

from io import StringIO

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoseek.artifacts.tables import (
    NO_VALUE,
    clean_row,
    number_of,
    parse_table,
    read_csv,
    value_of,
)
from histoseek.errors import BadInput

ROWS = ({"slide": "Präparat 7", "label": "gutartig"}, {"slide": "b", "label": ""})


def written(encoding="utf-8", separator=",", before="", newline="\r\n"):
    lines = [f"slide{separator}label", f"Präparat 7{separator}gutartig", f"b{separator}"]
    return (before + newline.join(lines) + newline).encode(encoding)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_every_separator_and_encoding_gives_the_same_rows(separator, encoding, newline):
    table = parse_table(written(encoding, separator, newline=newline), "t.csv", "slide")
    assert table.rows == ROWS
    said = " ".join(table.notes)
    assert ("cp1252" in said) == (encoding == "cp1252")
    names = {";": "semicolon", "\t": "tab", "|": "vertical bar"}
    assert names.get(separator, "") in said and ("separated" in said) == (separator != ",")


@pytest.mark.parametrize("separator", [";", ",", "\t"])
def test_excels_own_first_line_says_the_separator(separator):
    blob = written("utf-16", separator, before=f"sep={separator}\r\n")
    assert parse_table(blob, "t.csv", "slide").rows == ROWS


def test_a_table_without_the_column_names_what_was_found():
    with pytest.raises(BadInput, match=r"columns \['name', 'label'\].*'slide'.*utf-16.*semicolon"):
        parse_table("name;label\na;b\n".encode("utf-16"), "t.csv", "slide")
    for blob in (b"PK\x03\x04rest", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1rest"):
        with pytest.raises(BadInput, match="workbook.*CSV UTF-8"):
            parse_table(blob, "t.xlsx", "slide")


def test_columns_are_read_in_any_case():
    blob = b"Slide;Patient;LABEL;Organ\na;P1;x;colon\n"
    table = parse_table(blob, "t.csv", "slide", "file")
    assert table.rows == ({"slide": "a", "patient": "P1", "label": "x", "Organ": "colon"},)
    assert [note for note in table.notes if "read as" in note] == [
        f"t.csv: column {name!r} is read as {name.lower()!r}"
        for name in ("Slide", "Patient", "LABEL")
    ]
    also = parse_table(b"File,Series,Group\na,1,x\n", "t.csv", "file", also=("series",))
    assert also.rows == ({"file": "a", "series": "1", "Group": "x"},)
    both = parse_table(b"slide,patient,Patient\na,P1,P2\n", "t.csv", "slide")
    assert both.rows == ({"slide": "a", "patient": "P1", "Patient": "P2"},)
    with pytest.raises(BadInput, match="two columns of the same name"):
        parse_table(b"slide,Patient,PATIENT\na,P1,P2\n", "t.csv", "slide")


def test_all_texts_for_no_value_are_read_so_and_counted():
    texts = sorted(NO_VALUE - {""})
    blob = "slide,label\n" + "".join(f"s{n},{text}\n" for n, text in enumerate(texts))
    table = parse_table(blob.encode(), "t.csv", "slide")
    assert {row["label"] for row in table.rows} == {""}
    (note,) = table.notes
    assert note.startswith(f"t.csv: {len(texts)} cell(s) read as no value") and "NULL 1" in note
    assert pandas.read_csv(StringIO(blob))["label"].isna().all()  # pandas reads them so too
    assert clean_row({"a": float("nan"), "b": None, "c": "N/A", 4: 0}) == {
        "a": "", "b": "", "c": "", "4": "0"
    }  # fmt: skip
    assert value_of("NaN-positive") == "NaN-positive" and value_of("none") == "none"


def test_empty_columns_at_the_end_are_left_out_and_said():
    table = parse_table(
        b"slide,label,,\nbig,x,,\nsmall,y\n,,,\n".replace(b"y\n", b"y,,\n"), "t", "slide"
    )
    assert table.rows == ({"slide": "big", "label": "x"}, {"slide": "small", "label": "y"})
    assert table.notes == ("t: 2 empty column(s) without a name left out",)
    with pytest.raises(BadInput, match="line 2: 3 values for 2 columns"):
        parse_table(b"slide,label\nbig,x,y\n", "t", "slide")
    with pytest.raises(BadInput, match="line 2: 1 value for 2 columns"):
        parse_table(b"slide,label\nbig\n", "t", "slide")


def test_quoted_cells_may_hold_separators_and_line_breaks():
    table = parse_table(b'slide,note\na,"x, y"\nb,"two\nlines"\nc,\x85\n', "t", "slide")
    assert [row["note"] for row in table.rows] == ["x, y", "two\nlines", "…"]


def test_the_same_name_in_two_compositions_is_one_name():
    with pytest.raises(BadInput, match="appears twice"):
        parse_table("slide\n\u00e9\ne\u0301\n".encode(), "t", "slide")


def test_numbers_have_a_point_or_a_comma():
    assert (number_of("0,25"), number_of("0.25"), number_of("1e-1")) == (0.25, 0.25, 0.1)
    assert number_of("1.000,5") is None and number_of("x") is None


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"gone\.csv cannot be read"):
        read_csv(tmp_path / "gone.csv", "slide")


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(blob):
    try:
        table = parse_table(b"slide,label\n" + blob, "t", "slide")
    except BadInput:
        return
    assert all(set(row) == {"slide", "label"} and row["slide"] for row in table.rows)


def test_an_empty_table_is_said_to_be_empty():
    with pytest.raises(BadInput, match=r"t.csv is empty; expected a table with a column 'slide'"):
        parse_table(b"", "t.csv", "slide")
