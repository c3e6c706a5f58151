"""Output never breaks a command: any encoding, a closed or full stream, or no reader."""

import codecs
import json
import os
import subprocess
import sys

import pytest

from histoseek import console, outlets
from histoseek.console import EXIT_NO_READER, EXIT_NOT_PRINTED

NAME = "Fall µ – 組織 …"
"""A name with characters of Latin 1, of typography, and of neither."""
PRINTING = f"""
import sys
from histoseek import __main__, console
from histoseek.ui.cli import start
from histoseek.errors import BadInput
start.begin()

@__main__.app.command()
def shout(lines: int = 1) -> None:
    def human():
        console.table({NAME!r}, ("what", "value"), [("µm", None), ({NAME!r}, 1.5)])
        for _ in range(lines):
            console.say({NAME!r})
    console.emit({{"name": {NAME!r}}}, human)

@__main__.app.command()
def refuse() -> None:
    raise BadInput({NAME!r})

__main__.main()
"""
BROKEN = ("Traceback", "Exception ignored", "Error:")


def run(*words, encoding="utf-8", **options):
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([sys.executable, "-c", PRINTING, *words], env=env, **options)


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-8", NAME),
        ("latin-1", r"Fall µ - \u7d44\u7e54 ..."),
        ("ascii", r"Fall u - \u7d44\u7e54 ..."),
    ],
)
def test_any_encoding_gets_plain_text_and_valid_json(encoding, said):
    done = run("shout", encoding=encoding)
    text = done.stdout.decode(encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert text.splitlines()[0].rstrip() == said and text.splitlines()[-1] == said
    done = run("shout", "--json", encoding=encoding)
    assert json.loads(done.stdout.decode(encoding)) == {"name": NAME}
    done = run("refuse", encoding=encoding)
    assert done.returncode == 1
    assert done.stderr.decode(encoding).strip() == f"BadInput: {said}"
    done = run("refuse", "--json", encoding=encoding)
    assert json.loads(done.stdout.decode(encoding))["error"]["message"] == NAME


@pytest.mark.parametrize("words", [["shout"], ["shout", "--json"]])
def test_a_full_disk_is_named_and_has_a_code_of_its_own(words):
    with open("/dev/full", "wb") as full:
        done = run(*words, stdout=full)
    assert done.returncode == EXIT_NOT_PRINTED
    assert done.stderr.decode().startswith(
        "the answer could not be written to standard output (No space left on device)"
    )
    assert not any(word in done.stderr.decode() for word in BROKEN)


@pytest.mark.parametrize("words", [["shout"], ["shout", "--json"]])
def test_closed_streams(words):
    done = run(*words, stdout=None, preexec_fn=lambda: os.close(1))
    assert done.returncode == EXIT_NOT_PRINTED and b"Bad file descriptor" in done.stderr
    done = run(*words, stderr=None, preexec_fn=lambda: os.close(2))
    assert done.returncode == 0 and NAME.encode() in done.stdout.replace(b"\\u00b5", "µ".encode())
    done = run("refuse", stdout=None, stderr=None, preexec_fn=lambda: (os.close(1), os.close(2)))
    assert done.returncode == 1
    with open("/dev/full", "wb") as full:
        assert run("refuse", stderr=full).returncode == 1


@pytest.mark.parametrize("lines", ["1", "5000"])
def test_a_reader_that_goes_away_ends_nothing(lines):
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTING, "shout", "--lines", lines],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == EXIT_NO_READER and said == b""
    process.stderr.close()


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    """What a library prints to descriptor 1 or 2 must not get into a file that was opened there."""
    code = (
        "import os, sys\nfrom histoseek.ui.cli import start\nstart.begin()\n"
        "opened = open(sys.argv[1], 'w')\nassert opened.fileno() > 2, opened.fileno()\n"
        "os.write(1, b'noise'); os.write(2, b'noise')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "file"],
        preexec_fn=lambda: (os.close(0), os.close(1), os.close(2)),
    )
    assert done.returncode == 0 and (tmp_path / "file").read_text() == ""


def test_a_pipe_that_does_not_wait_loses_nothing():
    """Some parents make the pipe non-blocking; it holds 64 KiB."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    command = [sys.executable, "-c", PRINTING, "shout", "--lines", "20000"]
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    with os.fdopen(ours, "rb") as stream:
        text = stream.read().decode()
    assert process.wait(60) == 0 and process.stderr.read() == b""
    process.stderr.close()
    assert text.count(f"{NAME}\n") >= 20000


def test_a_file_name_that_is_no_text_is_printed_as_its_escape():
    codecs.register_error(outlets.PLAIN, outlets.plain)
    assert "x\udc80".encode("utf-8", outlets.PLAIN) == rb"x\udc80"
    with pytest.raises(UnicodeDecodeError):
        outlets.plain(UnicodeDecodeError("ascii", b"\xff", 0, 1, "no"))


def test_the_time_left_ignores_other_work_and_what_an_earlier_run_did(capsys, monkeypatch):
    clock = iter([0.0, 20.0, 100.0, 100.0, 130.0, 190.0, 200.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("training") as report:
        report(4335, 4335, "reading tiles")  # at 20 s
        report(105, 160, "resumed")  # at 100 s: the first report of other work
        report(105, 160, "resumed")
        report(106, 160, "one epoch")  # 30 s later
        report(108, 160, "three epochs")
        report(160, 160, "what follows")  # nothing is left to train, but the work goes on
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 4335/4335, reading tiles",
        "training: 105/160, resumed",
        "training: 106/160, 1620 s left, one epoch",
        "training: 108/160, 1560 s left, three epochs",
        "training: 160/160, what follows",
    ]
