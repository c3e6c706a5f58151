"""The audit log of a server: one line per request, in a chain that `index verify` checks."""

import json
import subprocess
import sys

import pytest


def verify(atlas):
    done = subprocess.run(
        [sys.executable, "-m", "histoseek", "index", "verify", str(atlas), "--json"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)["problems"]


@pytest.fixture
def asked(serve, own_atlas):
    one = serve(own_atlas)
    for tile in (1, 2, 3):
        assert one.client.post("/v1/search", json={"like": [tile]}).status_code == 200
    assert one.client.delete("/v1/slides/case-2").status_code == 200
    return one


def test_index_verify_names_a_line_that_was_changed(asked, own_atlas):
    assert [line["action"] for line in asked.lines()] == [*["search"] * 3, "remove"]
    assert [line["n"] for line in asked.lines()] == [1, 2, 3, 4]
    assert verify(own_atlas) == (0, [])
    asked.log.write_text(asked.log.read_text().replace('"slide": "case-2"', '"slide": "case-1"'))
    code, (text,) = verify(own_atlas)
    assert code == 1 and f"{asked.log}, line 4: it was changed (number 4)" in text


def test_index_verify_names_a_line_that_was_removed(asked, own_atlas):
    kept = asked.log.read_text().splitlines(keepends=True)
    asked.log.write_text("".join(kept[:1] + kept[2:]))
    code, (text,) = verify(own_atlas)
    assert code == 1 and "line 2: before it, number 2 is missing" in text
    asked.log.write_text("".join(kept[:3]))
    code, (text,) = verify(own_atlas)
    assert code == 1 and "number 4 is missing at its end" in text


def test_the_chain_goes_on_over_restarts(asked, own_atlas, serve, capfd):
    asked.close = lambda: None
    asked.client.close(), asked.additions.close(), asked.audit.close(), asked.session.close()
    last = asked.lines()[-1]["chain"]
    assert f"audit log: ends at line 4, sha256 {last}" in capfd.readouterr().out
    again = serve(own_atlas)
    assert f"audit log: begins at line 4, sha256 {last}" in capfd.readouterr().out
    assert again.client.post("/v1/search", json={"like": [1]}).status_code == 200
    assert again.lines()[-1]["n"] == 5 and verify(own_atlas) == (0, [])
