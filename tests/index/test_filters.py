"""Filters: they select the same rows as plain Python, and no part of a filter is ever executed."""

import math
import time

import numpy as np
import pytest
from atlases import filled
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule import rounds

from histoseek.errors import BadInput
from histoseek.index.search import filters
from histoseek.index.search.filters import Compare, Some, parse, quoted_field, select

VALUES = {
    "label": ["a", "b", "it's", None],
    "organ": ["colon", "lung", "", None],
    "stage": ["1", "2", "10", "x", None],
}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filters")
    metadata = {}
    for number in range(12):
        row = {key: values[number % len(values)] for key, values in VALUES.items()}
        metadata[f"slide-{number}"] = {k: v for k, v in row.items() if v is not None}
        metadata[f"slide-{number}"]["patient"] = f"P{number}"
    made = filled(folder, slides=12, count=20, metadata=metadata)
    made.fit("kmeans", k=3)
    return made


def rows_of(atlas):
    """What plain Python knows of each tile."""
    columns = atlas.view().columns
    slides = {s["name"]: s for s in atlas.slides()}
    clusters = columns.clusters()
    rows = []
    for position, hit in enumerate(
        atlas.tiles(columns.ids(np.arange(len(columns))).tolist()).values()
    ):
        slide = slides[hit["slide"]]
        rows.append(
            {"slide": hit["slide"], "patient": hit["patient"], "label": hit["label"], "x": hit["x"],
             "y": hit["y"], "cluster": int(clusters[position]), "mpp": hit["mpp"],
             "organ": slide["metadata"].get("organ"), "stage": slide["metadata"].get("stage")}
        )  # fmt: skip
    return rows


def quoted(text):
    return "'" + text.replace("'", "''") + "'"


texts = st.sampled_from(["a", "b", "it's", "colon", "lung", "P3", "1", "10", "zzz"])
numbers = st.sampled_from([0, 1, 2, 10, 0.25, -1, 4500])
fields = st.sampled_from(["label", "organ", "stage", "patient", "slide"])


@st.composite
def comparisons(draw):
    """A comparison as text, and as a function of a row."""
    if draw(st.booleans()):
        field, value = draw(st.sampled_from(["x", "y", "cluster", "mpp"])), draw(numbers)
        sign = draw(st.sampled_from(["=", "!=", "<", "<=", ">", ">="]))
        name = {"=": "__eq__", "!=": "__ne__", "<": "__lt__", "<=": "__le__", ">": "__gt__",
                ">=": "__ge__"}[sign]  # fmt: skip
        return f"{field} {sign} {value}", lambda row: getattr(float(row[field]), name)(float(value))
    field = draw(fields)
    kind = draw(st.sampled_from(["=", "!=", "in", "not in", "null", "not null", "<", "like"]))
    if kind in {"null", "not null"}:
        text = f"{field} is {kind}"
        return text, lambda row: (row[field] is None) == (kind == "null")
    if kind in {"in", "not in"}:
        values = draw(st.lists(texts, min_size=1, max_size=3))
        text = f"{field} {kind} ({', '.join(map(quoted, values))})"
        return text, lambda row: (row[field] in values) == (kind == "in")
    value = draw(texts)
    if kind == "like":
        start = value[:1]
        return (
            f"{field} LIKE {quoted(start + '%')}",
            lambda row: row[field] is not None and row[field].lower().startswith(start.lower()),
        )
    if kind == "<":
        return (
            f"{field} < {quoted(value)}",
            lambda row: row[field] is not None and row[field] < value,
        )
    return f"{field} {kind} {quoted(value)}", lambda row: (row[field] == value) == (kind == "=")


def joined(parts):
    return st.tuples(st.sampled_from(["and", "or"]), parts, parts).map(
        lambda t: (
            f"({t[1][0]} {t[0]} {t[2][0]})",
            (lambda row: t[1][1](row) and t[2][1](row))
            if t[0] == "and"
            else (lambda row: t[1][1](row) or t[2][1](row)),
        )
    ) | parts.map(lambda p: (f"NOT ({p[0]})", lambda row: not p[1](row)))


@pytest.mark.deep
@settings(max_examples=rounds(100, 2000), deadline=None)
@given(st.recursive(comparisons(), joined, max_leaves=5))
def test_a_filter_lets_through_what_plain_python_does(atlas, wanted):
    text, holds = wanted
    mask = select(atlas.view().columns, parse(text))
    assert mask.tolist() == [bool(holds(row)) for row in rows_of(atlas)], text


def test_numbers_in_texts_are_compared_as_numbers(atlas):
    def stages(where):
        columns = atlas.view().columns
        return set(np.array([*columns.coded("stage").names, None])[
            columns.coded("stage").codes[select(columns, parse(where))]
        ].tolist())  # fmt: skip

    assert stages("stage >= 2") == {"2", "10"} and stages("stage >= '2'") == {"2", "x"}
    assert stages("stage = 1.0") == {"1"} and None in stages("stage != 1")
    assert stages("stage in (1.0, 'x')") == {"1", "x"}
    assert stages("stage not in (1.0, 'x')") == {"2", "10", None}


def test_decimal_commas_are_numbers_and_dates_that_do_not_sort_are_refused(tmp_path):
    sizes = ["12,5", "3,0", "2.25", "unknown"]
    metadata = {f"slide-{n}": {"size": sizes[n], "seen": f"{n + 1}.12.2023"} for n in range(4)}
    made = filled(tmp_path, slides=4, count=5, metadata=metadata)

    def slides(where):
        return {row["slide"] for row, passes in zip(
            rows_of(made), select(made.view().columns, parse(where)), strict=True) if passes}  # fmt: skip

    made.fit("kmeans", k=2)
    assert slides("size > 2.5") == {"slide-0", "slide-1"} and slides("size = 12.5") == {"slide-0"}
    assert slides("size in (2.25, 3)") == {"slide-1", "slide-2"}
    assert slides("seen = '2.12.2023'") == {"slide-1"}
    for value in ("1.1.2024", "12/31/2023 10:00", "01.02.24", "2024-01-01"):
        with pytest.raises(BadInput, match="seen is compared as text.*2024-01-31"):
            slides(f"seen > '{value}'")
    assert slides("size > '1.2.10'"), "a version is no date"
    assert not filters.holds("1,234", Compare("size", ">", (1.0,))), "1.234 or 1234"
    with pytest.raises(BadInput, match="in backticks"):
        slides("tumour size > 2")


@pytest.mark.parametrize(
    "pattern, name, is_like",
    [
        ("%", "", True), ("a%", "ABC", True), ("a%c", "abd", False), ("_b_", "abc", True),
        ("_", "", False), ("a*c", "abc", False), ("a*c", "a*c", True), ("a?c", "abc", False),
        ("[ab]%", "a", False), ("[ab]%", "[ab]c", True), ("%.svs", "a.svs.tmp", False),
        ("%b%", "a\nb\nc", True), ("a\\%", "a\\b", True), ("[!a]", "[!a]", True), ("%b%b", "ab", False),
    ],
)  # fmt: skip
def test_like_takes_percent_and_underline_only(pattern, name, is_like):
    assert filters.holds(name, Compare("file", "like", (pattern,))) == is_like
    assert filters.holds(name, Compare("file", "not like", (pattern,))) != is_like


def test_long_lists_and_patterns_take_no_long_time():
    names = [f"tile-{n}.png" for n in range(100_000)]
    started = time.process_time()
    some = Compare("file", "not in", tuple(f"tile-{7 * n}.png" for n in range(1000)))
    assert sum(filters.holds(name, some) for name in names) == 99_000
    evil = Compare("file", "like", ("%a" * 30 + "%b",))
    assert not filters.holds("a" * 200, evil)
    assert (
        time.process_time() - started < 5
    )  # .1 s; minutes if every value is compared, or every split


def test_and_binds_closer_than_or(atlas):
    columns = atlas.view().columns
    bare = select(columns, parse("label = 'a' or label = 'b' and organ = 'lung'"))
    assert np.array_equal(
        bare, select(columns, parse("label = 'a' or (label = 'b' and organ = 'lung')"))
    )
    assert not np.array_equal(
        bare, select(columns, parse("(label = 'a' or label = 'b') and organ = 'lung'"))
    )


@pytest.mark.parametrize(
    "text",
    ["label =", "= 'a'", "label = 'a", "label 'a'", "label = a", "label = 'a' and", "(label = 'a'",
     "label in ()", "drop table slides", "label = 'a'; drop table slides", "label like 3", "and = 'a'",
     "label = 'a' -- x"],
)  # fmt: skip
def test_what_is_no_filter_is_refused(atlas, text):
    with pytest.raises(BadInput, match="cannot be read at character"):
        select(atlas.view().columns, parse(text))


def test_brackets_without_end_do_no_harm(atlas):
    try:
        select(atlas.view().columns, parse("(" * 4000 + "label = 'a'" + ")" * 4000))
    except BadInput as error:
        assert "cannot be read" in str(error)


def test_wrong_fields_and_kinds_are_named(atlas):
    columns = atlas.view().columns
    with pytest.raises(BadInput, match="unknown field 'grade'.*organ.*stage"):
        select(columns, parse("grade = 3"))
    with pytest.raises(BadInput, match="unknown clustering 'other'.*kmeans"):
        select(columns, parse("cluster.other = 3"))
    with pytest.raises(BadInput, match="x is a number"):
        select(columns, parse("x = 'left'"))
    with pytest.raises(BadInput, match="characters; at most"):
        parse("label = '" + "a" * 20_000 + "'")


def test_a_value_is_never_part_of_a_query(atlas):
    evil = "a'); DROP TABLE slides; --"
    before = atlas.slides()
    assert not select(atlas.view().columns, parse(f"label = {quoted(evil)}")).any()
    assert atlas.slides() == before and math.isfinite(len(before))


@pytest.mark.parametrize("text, place", [("organ = colon", 9), ("a = 1 and organ colon", 17)])
def test_an_error_points_to_its_place(text, place):
    with pytest.raises(BadInput, match=f"at character {place}"):
        parse(text)


@pytest.mark.parametrize(
    "value",
    [
        "two\nlines",
        "two\r\nlines",
        "a\ttab",
        "C:\\temp\\new",
        "it's",
        'a "word"',
        "end\\",
        "\\'",
        "",
    ],
)
@pytest.mark.parametrize("field", ["organ", "two\nlines", "a\\tb"])
def test_a_text_in_quotes_is_taken_as_it_stands(value, field):
    found = parse(f"`{field}` = {filters.quoted(value)}\n or\tx > 3")
    assert found == Some((Compare(field, "=", (value,)), Compare("x", ">", (3.0,))))
    double = '"' + value.replace('"', '""') + '"'
    assert parse(f"`{field}` in ({double},\n{filters.quoted(value)})") == Compare(
        field, "in", (value,) * 2
    )


def test_columns_of_any_name_and_texts_of_any_characters_are_asked_as_they_stand(tmp_path):
    columns = ["note", "two\nlines", "a`b", "in", "Not", "größe", "ER/PR", "1st", "a.b", r"a\n"]
    values = sorted(
        {"line 1\nline 2", "a\r\nb", "tab\there", r"C:\new\table", 'it\'s "so"\n', "\n"}
    )
    given = {f"slide-{n}": dict.fromkeys(columns, value) for n, value in enumerate(values)}
    known = filled(tmp_path, slides=len(values), count=2, metadata=given).view().columns
    for number, value in enumerate(values):
        for column in columns:
            text = f"{quoted_field(column)}\n =\r\n\t{quoted(value)}\n"
            found = known.slide_of(np.flatnonzero(select(known, parse(text))))
            assert {known.slides[n]["name"] for n in found} == {f"slide-{number}"}, text


def test_cells_that_are_no_numbers_are_counted(atlas, cli, cli_json):
    (note,) = atlas.view().notes("not (stage > 1 and stage <= 5)")
    assert note == (
        "no numbers, so not compared with one: 1 of 4 different values of 'stage', such as 'x'"
    )
    assert atlas.view().notes("stage in (1, 'x') or stage = 2") == [note]
    for where in (None, "stage = 'x'", "stage != 1", "stage is null", "x > 3", "cluster = 1"):
        assert atlas.view().notes(where) == []
    for asked in (
        ("search", atlas.path, "--tile", "3"), ("similar", atlas.path, "slide-1"),
        ("audit", atlas.path), ("duplicates", atlas.path),
    ):  # fmt: skip
        words = ("index", *asked, "--where", "stage > 1")
        assert cli_json(*words)["notes"] == [note]
        assert note in " ".join(cli(*words, check=True).stdout.split())
