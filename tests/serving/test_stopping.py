"""Ctrl-C at random moments of real runs, under load: always the same exit code, and nothing left over.

``HISTOSEEK_STOP_ROUNDS`` sets the number of signals per kind of run. ``HISTOSEEK_STOP_KINDS`` sets the
kinds: ``here``, ``triton`` and ``ray`` (slow, because a cluster has to start). ``HISTOSEEK_DEEP=1`` sends
100 signals to every kind.
"""

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from schedule import DEEP, rounds

from histoseek.artifacts.feature_files import read_features
from histoseek.artifacts.manifest import read_manifest
from histoseek.export.options import TritonOptions
from histoseek.export.triton import write_repository
from histoseek.serving.encoders.open import DEFAULT_BUNDLE

ROUNDS = int(os.environ.get("HISTOSEEK_STOP_ROUNDS", rounds(2, 100)))
KINDS = os.environ.get("HISTOSEEK_STOP_KINDS", "here,triton,ray" if DEEP else "here,triton").split(
    ","
)
MARK = "HISTOSEEK_TEST_MARK"
BROKEN = ("Traceback", "Exception ignored", "Fatal Python error", "Segmentation", "Aborted")
MODEL = read_manifest(DEFAULT_BUNDLE).name
HERE = ["--engine", "onnxruntime"]
CLUSTER = """
import json, os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def slides(make_slide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for number in range(4):
        make_slide(folder / f"case-{number}.tiff", side=700, seed=number)
    return folder


@pytest.fixture(scope="module")
def load():
    """Keep every core busy."""
    code = "while True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(os.cpu_count() or 1)]
    yield
    for process in busy:
        process.kill()
        process.wait()


@contextmanager
def place(kind, triton, folder):
    """Yield the options of ``embed`` that make it run in a kind of place, which serves all rounds."""
    if kind == "here":
        yield HERE
    elif kind == "triton":
        write_repository([DEFAULT_BUNDLE], folder / "models", TritonOptions(max_batch=4))
        config = folder / "models" / MODEL / "config.pbtxt"
        slow = 'parameters { key: "test_delay_s" value: { string_value: "0.03" } }\n'
        config.write_text(config.read_text() + slow)
        yield ["--encoder", triton(folder / "models").url(MODEL, "?shm=1")]
    else:
        command = [sys.executable, "-c", CLUSTER]
        cluster = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )  # fmt: skip
        try:
            yield [*HERE, "--ray", cluster.stdout.readline().strip()]
        finally:
            cluster.stdin.close()
            cluster.wait(60)
            cluster.stdout.close()


def started(command, mark):
    """Start a command; return it when its handlers are there: it has a second thread, which listens."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, MARK: mark}
    )  # fmt: skip
    tasks = Path(f"/proc/{process.pid}/task")
    end = time.monotonic() + 60
    while process.poll() is None and len(list(tasks.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.001)
    return process


def marked(mark):
    """Return the commands of processes that a command has started and that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def gone(find, patience_s=20):
    """Return what ``find`` still finds after a while, [] at best."""
    end = time.monotonic() + patience_s
    while (left := find()) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def embed_words(slides, out, words):
    module = [sys.executable, "-X", "faulthandler", "-m", "histoseek"]
    return [*module, "embed", str(slides), "--out", str(out), "--overlap", "64", "--json", *words]


@pytest.mark.slow
@pytest.mark.deep
@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_at_random_moments(kind, slides, load, triton, tmp_path):
    rng = random.Random(f"{kind} {ROUNDS}")
    sent = 0
    with place(kind, triton, tmp_path) as words:
        began = time.monotonic()
        whole = started(embed_words(slides, tmp_path / "whole", words), "whole")
        armed = time.monotonic()
        answer, said = whole.communicate(timeout=300)
        seconds = time.monotonic() - armed
        assert whole.returncode == 0, said + answer
        while sent < ROUNDS:
            assert time.monotonic() - began < 60 + 10 * seconds * ROUNDS, "signals come too late"
            out, mark = tmp_path / f"out-{sent}", f"{kind}-{sent}"
            process = started(embed_words(slides, out, words), mark)
            time.sleep(rng.uniform(0, seconds))
            process.send_signal(signal.SIGINT)
            answer, said = process.communicate(timeout=60)
            if process.returncode == 0:  # it was through already
                continue
            assert process.returncode == 130, (process.returncode, said)
            assert not any(word in said for word in BROKEN), said
            assert "repeat the command" in said or "answer is complete" in said, said
            assert isinstance(json.loads(answer), dict)
            assert gone(lambda mark=mark: marked(mark)) == []
            assert gone(lambda out=out: list(out.rglob("*.histoseek-tmp"))) == []
            assert list(Path("/dev/shm").glob(f"histoseek-{process.pid}-*")) == []
            for path in out.rglob("*.h5"):
                assert read_features(path).source.endswith(f"{path.stem}.tiff")
            sent += 1
        again = subprocess.run(
            embed_words(slides, tmp_path / "out-0", words), capture_output=True, text=True, timeout=300
        )  # fmt: skip
    assert again.returncode == 0, again.stderr
    names = [f"case-{number}.h5" for number in range(4)]
    assert sorted(path.name for path in (tmp_path / "out-0").rglob("*.h5")) == names


STUCK = """
import ctypes, sys
from pathlib import Path
from histoseek.artifacts import files
from histoseek.ui.cli import start
start.begin()
files.temporary(Path(sys.argv[1]) / "half.h5")
print("there", flush=True)
wait = ctypes.CDLL(None).sleep if sys.argv[2] == "free" else ctypes.PyDLL(None).usleep
while True:
    wait(60 if sys.argv[2] == "free" else 100_000)
"""


@pytest.mark.parametrize("holds", ["free", "lock"])
def test_a_second_ctrl_c_ends_a_process_that_is_in_foreign_code(tmp_path, holds):
    """A call of C that no signal interrupts, without Python's lock and with it for a tenth of a second."""
    command = [sys.executable, "-c", STUCK, tmp_path, holds]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == (
        "stopping after the current step; press Ctrl-C again to end at once\n"
    )
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130 and said.startswith("ended at once"), said
    assert list(tmp_path.iterdir()) == []


def test_two_signals_of_one_key_press_are_one(tmp_path):
    """A terminal and a wrapper such as make may each send one."""
    code = (
        "import time\nfrom histoseek import stopping\nfrom histoseek.ui.cli import start\n"
        "start.begin()\nprint('there', flush=True)\n"
        "time.sleep(.5)\nprint(stopping.requested())\nstopping.check()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    out, said = process.communicate(timeout=10)
    assert out == "True\n" and "Stopped: Ctrl-C" in said and "ended at once" not in said


def test_an_import_leaves_the_signals_of_a_library_user_alone():
    code = (
        "import signal\nfrom histoseek import stopping\nfrom histoseek.ui.cli import start\n"
        "from histoseek.artifacts import feature_writer\n"
        "from histoseek.serving.embedding import pipeline\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "signal.raise_signal(signal.SIGINT)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.rstrip().endswith("KeyboardInterrupt"), done.stderr


def test_a_forked_child_has_python_s_own_handling():
    code = (
        "import os, signal\nfrom histoseek import stopping\nfrom histoseek.ui.cli import start\n"
        "start.begin()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "    assert signal.set_wakeup_fd(-1) == -1\n"
        "    os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "assert not stopping.requested()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_sigterm_stops_like_ctrl_c_with_its_own_code(slides, tmp_path):
    words = embed_words(slides, tmp_path / "out", HERE)
    process = started(words, "sigterm")
    process.send_signal(signal.SIGTERM)
    answer, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "repeat the command" in said, said
    assert json.loads(answer)["error"]["type"] == "Stopped"


def test_a_closed_terminal_stops_a_command_like_ctrl_c(slides, tmp_path):
    """The kernel sends SIGHUP, and what the command then writes fails; its files are in order."""
    own, of_command = os.openpty()
    many = [*HERE, "--overlap", "200"]  # tiles, so that the other slides take a while
    words = [word for word in embed_words(slides, tmp_path / "out", many) if word != "--json"]
    process = subprocess.Popen(
        ["setsid", "--ctty", *words], stdin=of_command, stdout=of_command, stderr=of_command
    )
    os.close(of_command)
    end = time.monotonic() + 60
    while not list(tmp_path.rglob("*.h5*")) and time.monotonic() < end:  # the first slide
        if select.select([own], [], [], 0.01)[0]:
            os.read(own, 4096)  # its progress: else it waits for the terminal
    os.close(own)
    assert process.wait(60) == 129
    assert json.loads((tmp_path / "out/run.json").read_text())["ended"] == "Stopped: SIGHUP"
    assert list(tmp_path.rglob("*.histoseek-tmp")) == []


def test_a_second_hangup_is_no_wish_to_end_at_once():
    """When a terminal closes, the shell and the kernel may send one each."""
    code = (
        "import time\nfrom histoseek import stopping\nfrom histoseek.ui.cli import start\nstart.begin()\n"
        "print('there', flush=True)\nwhile not stopping.requested():\n    time.sleep(.01)\n"
        "print('asked', flush=True)\ntime.sleep(1)\nprint('in order', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.stdout.readline()
    time.sleep(0.4)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=30)[0] == "in order\n" and process.returncode == 0


def test_a_long_call_is_left_alone_when_the_command_stops():
    """FAISS, HDBSCAN and t-SNE compute in a thread that ends with the process."""
    code = (
        "import time\nfrom histoseek import stopping\nfrom histoseek.ui.cli import start\nstart.begin()\n"
        "assert stopping.aside(lambda: 3) == 3\nprint('there', flush=True)\n"
        "try:\n    stopping.aside(lambda: time.sleep(60))\n"
        "except stopping.Stopped:\n    stopping.leave(stopping.exit_code())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    sent = time.monotonic()
    threading.Timer(0.1, process.send_signal, (signal.SIGINT,)).start()
    assert process.wait(10) == 130 and time.monotonic() - sent < 3
    process.stdout.close()
