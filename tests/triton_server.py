"""Start the real tritonserver, from the wheel nvidia-pytriton, on free loopback ports; needs no GPU.

The wheel contains only Triton's python backend, so `tests/triton_backends/onnxruntime` replaces the
onnxruntime backend; the model repositories are served unmodified.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

STAND_IN = Path(__file__).parent / "triton_backends/onnxruntime/model.py"


def free_ports(count):
    holders = [socket.socket() for _ in range(count)]
    for holder in holders:
        holder.bind(("127.0.0.1", 0))
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


def installed():
    """Where the wheel put the server; without importing the wheel, whose requirements are not wanted."""
    found = importlib.util.find_spec("pytriton")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError(
            "tests need the real tritonserver: pip install --no-deps nvidia-pytriton==0.7.0 "
            "(make test does it)"
        )
    return Path(found.submodule_search_locations[0])


class TritonServer:
    """One server process; it can be killed and started again on the same ports."""

    def __init__(self, repository, work, extra=(), preexec=None, cuda=False):
        self.repository, self.work, self.extra, self.preexec = (
            repository,
            Path(work),
            extra,
            preexec,
        )
        self.cuda = cuda
        self.process = None
        self.grpc_port = self.http_port = 0
        self._backends = self._copy_backends()

    @property
    def log(self):
        return (self.work / "triton.log").read_text(errors="replace")

    def url(self, model, options=""):
        return f"triton://127.0.0.1:{self.grpc_port}/{model}{options}"

    def _copy_backends(self):
        """Copies, because the server refuses links that lead out of its backend directory."""
        server = installed() / "tritonserver"
        folder = self.work / "backends"
        (folder / "python").mkdir(parents=True)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        for file in (
            server / "backends/python/libtriton_python.so",
            server / "backends/python/triton_python_backend_utils.py",
            server / f"python_backend_stubs/{version}/triton_python_backend_stub",
        ):
            shutil.copy2(file, folder / "python" / file.name)
        (folder / "onnxruntime").mkdir()
        shutil.copy2(STAND_IN, folder / "onnxruntime/model.py")
        return folder

    def start(self, timeout_s=60):
        for _ in range(3):  # a port can be taken between looking for it and listening on it
            if not self.grpc_port:
                self.grpc_port, self.http_port = free_ports(2)
            if self._start_once(timeout_s):
                return self
            if "already in use" not in self.log:
                break
            self.grpc_port = 0
        raise RuntimeError(f"tritonserver did not start:\n{self.log[-4000:]}")

    def _start_once(self, timeout_s):
        root = installed()
        server = root / "tritonserver"
        env = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "TMPDIR")}
        env["PATH"] = (
            f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"  # whose python3 is the stub's
        )
        libraries = root.parent / "nvidia_pytriton.libs"
        env["LD_LIBRARY_PATH"] = f"{libraries}:{sysconfig.get_config_var('LIBDIR')}"
        env |= {"ORT_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}
        if self.cuda:
            kept = ("CUDA_VISIBLE_DEVICES", "PYTHONPATH")
            env |= {key: os.environ[key] for key in kept if key in os.environ}
            env["LD_LIBRARY_PATH"] += ":" + os.environ.get("LD_LIBRARY_PATH", "")
            env["HISTOSEEK_STAND_IN_ON"] = "cuda"
            if "CUDA_VISIBLE_DEVICES" not in os.environ:
                del env["CUDA_VISIBLE_DEVICES"]
        command = [
            server / "bin/tritonserver",
            f"--model-repository={self.repository}",
            f"--backend-directory={self._backends}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.grpc_port}",
            "--http-address=127.0.0.1",
            f"--http-port={self.http_port}",
            "--allow-metrics=false",
            "--exit-timeout-secs=5",
            "--disable-auto-complete-config",
            "--exit-on-error=false",
            f"--cache-directory={server / 'caches'}",
            *self.extra,
        ]
        with open(self.work / "triton.log", "wb") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), env=env, stdout=log, stderr=log, preexec_fn=self.preexec,
                start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < end:
            try:  # over HTTP, because a refused gRPC channel waits a second before it tries again
                url = f"http://127.0.0.1:{self.http_port}/v2/health/live"
                with urllib.request.urlopen(url, timeout=1) as answer:
                    if answer.status == 200:
                        return True
            except OSError:
                time.sleep(0.02)
        self.stop()
        return False

    def kill(self):
        self._kill_all()
        self.process.wait()

    def _kill_all(self):
        """Kill the server and the processes of its backends, which outlive it otherwise."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
            self.kill()

    def __enter__(self):
        return self.start()

    def __exit__(self, *error):
        self.stop()
