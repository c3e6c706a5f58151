"""Nothing tries to contact another machine: checked in an isolated network that records every attempt."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CATCHER = Path(__file__).parent / "catch_network.py"
PAGE = """
import sys, urllib.request
from pathlib import Path
from histoseek.__main__ import main  # sets what must be set before imports
from histoseek.ui.server import Running, ServeOptions
running = Running(Path(sys.argv[1]), ServeOptions(port=17861))
urllib.request.urlopen(running.address, timeout=20).read()
running.close()
"""
LOOKUP = """
import urllib.request
try:
    urllib.request.urlopen("http://telemetry.example/ping", timeout=5)
except OSError:
    pass
"""


def may_make_networks():
    command = ["unshare", "-rn", "ip", "link", "set", "lo", "up"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(
    not may_make_networks(),
    reason="no network of one's own here",
)
def test_nothing_leaves_the_machine(make_slide, cli_process, tmp_path):
    slide = make_slide(tmp_path / "case.tiff", side=700)
    cli_process("embed", slide, "--out", tmp_path / "features", check=True)
    cli_process("index", "create", tmp_path / "atlas", check=True)
    cli_process("index", "add", tmp_path / "atlas", tmp_path / "features", check=True)
    here = [sys.executable, "-m", "histoseek"]
    commands = {
        "a lookup, to see that it is seen": [sys.executable, "-c", LOOKUP],
        "doctor": [*here, "doctor"],
        "onnxruntime": [*here, "embed", slide, "--out", tmp_path / "a", "--engine", "onnxruntime"],
        "openvino": [*here, "embed", slide, "--out", tmp_path / "b", "--engine", "openvino"],
        "ray": [*here, "embed", slide, "--out", tmp_path / "c", "--ray", "local"],
        "repository": [*here, "triton", "repository", "default", "--out", tmp_path / "m", "--fp16"],
        "page": [sys.executable, "-c", PAGE, tmp_path / "atlas"],
    }
    words = json.dumps([[str(word) for word in command] for command in commands.values()])
    env = {**os.environ, "HOME": str(tmp_path / "home"), "HISTOSEEK_CACHE": str(tmp_path / "cache")}
    for name in ("ORT_DISABLE_TELEMETRY", "GRADIO_ANALYTICS_ENABLED", "RAY_USAGE_STATS_ENABLED",
                 "HF_HUB_DISABLE_TELEMETRY"):  # fmt: skip
        env.pop(name, None)  # the program itself must switch them off
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, CATCHER, words], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    found = dict(zip(commands, json.loads(done.stdout), strict=True))
    control = found.pop("a lookup, to see that it is seen")
    assert control["contacts"] == ["connection to 198.51.100.7:80", "name telemetry.example"]
    for name, what in found.items():
        assert what["code"] == 0, (name, what["said"])
        assert what["contacts"] == [], (name, what["contacts"])
    assert not (tmp_path / "home/.cache/Microsoft").exists()
    assert not (tmp_path / "home/intel").exists()


def test_telemetry_is_off_before_anything_is_imported():
    """Python's own audit of connections and lookups, where no network of one's own can be made."""
    code = """
import sys
seen = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        seen.append((event, args[-1] if event == "socket.connect" else args[0]))
sys.addaudithook(hook)
from histoseek.__main__ import app
from histoseek.ui.cli.doctor import examine
examine()
import os, gradio
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
assert gradio.analytics.analytics_enabled() is False
assert sys.modules.get("openvino_telemetry") is None
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
