"""The chain of the audit log: changes to its lines are detected, and normal use never breaks it."""

import errno
import gzip
import hashlib
import json
import os
import subprocess
import sys

import pytest

from histoseek.artifacts import audit_chain
from histoseek.artifacts.audit_chain import ChainedLog, head_path, problems


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def write(path, *actions):
    log = ChainedLog(path)
    for action in actions:
        log.append({"action": action, "user": "änna", "where": 'x = "follows": "1"'})
    notes = list(log.notes)
    log.close()
    return notes


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


def test_lines_are_linked_as_the_docs_say(path):
    assert write(path, "search", "add") == [] and write(path, "remove") == []
    before = "0" * 64
    for number, line in enumerate(lines(path), 1):
        told = json.loads(line)
        assert told["n"] == number and list(told)[-1] == "chain"
        content = line[: line.rindex(b', "chain"')]
        assert told["chain"] == hashlib.sha256(before.encode() + content).hexdigest()
        before = told["chain"]
    assert head_path(path).read_text().split() == ["3", before]
    assert problems(path) == []
    for file in (path, head_path(path)):
        assert file.stat().st_mode & 0o777 == 0o600


def changed(old):
    return [*old[:2], old[2].replace(b"nna", b"NNA"), *old[3:]]


def renumbered(old):
    return [*old[:2], old[2].replace(b'"n": 3', b'"n": 4'), *old[3:]]


def forged(old):
    content = old[1][: old[1].rindex(b', "chain"')].replace(b'"n": 2', b'"n": 3')
    before = json.loads(old[1])["chain"]
    told = hashlib.sha256(before.encode() + content).hexdigest()
    return [*old[:2], content + b', "chain": "%s"}\n' % told.encode(), *old[2:]]


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (changed, "line 3: it was changed (number 3)"),
        (renumbered, "line 3: before it, number 3 is missing"),
        (lambda old: [*old[:2], *old[3:]], "line 3: before it, number 3 is missing"),
        (lambda old: [*old[:1], *old[4:]], "line 2: before it, numbers 2 to 4 are missing"),
        (lambda old: old[2:], "line 1: before it, numbers 1 to 2 are missing"),
        (lambda old: [*old[:2], old[1], *old[2:]], "line 3: it was inserted"),
        (forged, "line 4: it was inserted or moved (number 3 after 3)"),
        (lambda old: [*old[:2], b'{"action": "x"}\n', *old[2:]], "line 3: it was inserted"),
        (lambda old: [old[1], old[0], *old[2:]], "line 1: it was inserted (number 2)"),
        (lambda old: [*old, b'{"action": "x"}\n'], "line 6: it has no hash"),
        (lambda old: [*old, old[0][:30]], "line 6: it was cut off"),
        (lambda old: old[:-1], "number 5 is missing at its end"),
        (lambda old: old[:2], "numbers 3 to 5 are missing at its end"),
        (lambda old: [], "numbers 1 to 5 are missing at its end"),
        (lambda old: [b"\xff\0 no text\n", *old], "lines 1 to 2 of "),
    ],
)
def test_what_is_done_to_lines_is_named(path, tamper, says):
    write(path, "a", "b", "c", "d", "e")
    path.write_bytes(b"".join(tamper(lines(path))))
    found = problems(path)
    assert len(found) == 1 and says in found[0], found
    assert str(path) in found[0] and "restore the log from a copy" in found[0]


def test_the_files_themselves_are_missed(path):
    assert problems(path) == [], "there never was a log"
    write(path)
    assert head_path(path).read_text().split() == ["0", "0" * 64]
    assert problems(path) == [], "nobody has asked anything yet"
    head_path(path).write_bytes(b"")
    assert problems(path) == [], "as a former version left it"
    write(path, "a", "b")
    head = head_path(path).read_bytes()
    head_path(path).unlink()
    assert "head is missing" in problems(path)[0]
    head_path(path).write_bytes(b"")
    assert "head is missing" in problems(path)[0]
    assert "is missing; it is written again" in write(path)[0]
    assert problems(path) == []
    head_path(path).write_bytes(head[:20])
    assert "is damaged" in problems(path)[0]
    head_path(path).write_bytes(b"2 " + b"0" * 64 + b"\n")
    assert "no line 2 with the hash in its head file" in problems(path)[0]
    head_path(path).write_bytes(head)
    assert problems(path) == []
    head_path(path).write_bytes(b"0 " + b"0" * 64 + b"\n")
    assert "no line 0 with the hash in its head file" in problems(path)[0]
    head_path(path).write_bytes(head)
    path.unlink()
    assert "is missing, and 2 lines with it" in problems(path)[0]


def test_a_chain_made_anew_by_someone_without_the_head_is_seen(path):
    write(path, "a", "b", "c")
    head = head_path(path).read_bytes()
    path.unlink(), head_path(path).unlink()
    write(path, "a", "c", "d", "e")
    head_path(path).write_bytes(head)
    assert "no line 3 with the hash" in problems(path)[0]


def test_a_log_from_before_the_chain_is_covered_by_its_first_line(path):
    path.write_bytes(b'{"action": "search"}\n{"action": "add"}\n')
    assert problems(path) == [], "nothing is claimed of it yet"
    (note,) = write(path, "a", "b")
    assert "no hash chain; it begins now" in note and problems(path) == []
    old = path.read_bytes()
    path.write_bytes(old.replace(b"add", b"xdd"))
    assert "lines 1 to 3" in problems(path)[0] and "since the chain began" in problems(path)[0]
    path.write_bytes(old.partition(b"\n")[2])
    assert "since the chain began" in problems(path)[0]


def test_a_line_that_a_crash_cut_off_is_kept_and_covered(path):
    write(path, "a")
    with path.open("ab") as stream:
        stream.write(b'{"action": "sea')
    (note,) = write(path, "b")
    assert "cut off" in note and problems(path) == []
    assert lines(path)[1] == b'{"action": "sea\n'
    path.write_bytes(path.read_bytes().replace(b"sea\n", b"xea\n"))
    assert "line 2: it was changed or inserted" in problems(path)[0]


def test_lines_that_were_cut_off_are_not_forgotten_when_the_server_goes_on(path):
    write(path, "a", "b", "c", "d")
    path.write_bytes(b"".join(lines(path)[:2]))
    (note,) = write(path, "e", "f")
    assert "does not end with line 4" in note
    found = problems(path)
    assert len(found) == 1 and "before line 3, numbers 3 to 4 are missing" in found[0]
    assert [json.loads(line)["n"] for line in lines(path)] == [1, 2, 5, 6]


def test_a_rotated_log_is_whole_together_with_its_older_file(path):
    log = ChainedLog(path)
    log.append({"action": "a"}), log.append({"action": "b"})
    older = path.with_name("audit.jsonl.1")
    path.rename(older)  # while it is open
    log.append({"action": "c"})
    log.close()
    assert [json.loads(line)["n"] for line in lines(path)] == [3]
    assert problems(path) == []
    packed = path.with_name("audit.jsonl.1.gz")
    packed.write_bytes(gzip.compress(older.read_bytes()))
    older.unlink()
    assert problems(path) == []
    packed.write_bytes(packed.read_bytes()[:40])
    assert (
        "numbers 1 to 2 are missing: no older log file in its folder ends with them"
        in problems(path)[0]
    )


def test_a_log_that_is_emptied_while_it_is_open_says_so(path):
    log = ChainedLog(path)
    log.append({"action": "a"})
    os.truncate(path, 0)
    log.append({"action": "b"})
    assert "rotated, emptied or cut" in log.notes[0]
    log.close()
    assert "number 1 is missing" in problems(path)[0]


WRITER = """
import sys
from pathlib import Path
from histoseek.artifacts.audit_chain import ChainedLog
log = ChainedLog(Path(sys.argv[1]))
for n in range(200):
    log.append({"action": f"{sys.argv[2]} {n}"})
"""


def test_several_processes_write_one_chain(path):
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, name], stderr=subprocess.PIPE)
        for name in "abc"
    ]
    assert [(p.communicate()[1], p.returncode) for p in running] == [(b"", 0)] * 3
    assert len(lines(path)) == 600 and problems(path) == []
    assert [json.loads(line)["n"] for line in lines(path)] == list(range(1, 601))


def test_a_writer_that_is_killed_leaves_a_whole_chain(path):
    endless = WRITER.replace("range(200)", "range(10**9)")
    for seed in range(5):
        process = subprocess.Popen([sys.executable, "-c", endless, path, f"{seed}"])
        before = path.stat().st_size if path.exists() else 0
        while not path.exists() or path.stat().st_size < before + 20_000:
            assert process.poll() is None
        process.kill()
        process.wait()
    write(path, "last")
    assert problems(path) == []


def test_a_full_disk_leaves_no_half_line(path, monkeypatch):
    log = ChainedLog(path)
    log.append({"action": "a"})
    real, left = os.write, [1]

    def full(handle, blob):
        if left:
            left.pop()
            return real(handle, blob[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(audit_chain.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        log.append({"action": "b"})
    monkeypatch.undo()
    log.append({"action": "c"})
    log.close()
    assert [json.loads(line)["action"] for line in lines(path)] == ["a", "c"]
    assert problems(path) == []


def test_a_log_longer_than_what_is_read_from_its_end(path, monkeypatch):
    monkeypatch.setattr(audit_chain, "TAIL_BYTES", 300)
    write(path, *"abcdefgh")
    with path.open("ab") as stream:
        stream.write(b"x" * 1000)
    write(path, "i")
    assert problems(path) == [] and json.loads(lines(path)[-1])["n"] == 9
