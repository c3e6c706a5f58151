"""``histoseek ui`` in a process of its own, for benchmarks."""

import http.client
import signal
import subprocess
import sys
import time
from pathlib import Path

from loopback import free_port


class Server:
    def __init__(self, atlas):
        self.port = free_port()
        command = [sys.executable, "-m", "histoseek", "ui", atlas, "--port", self.port]
        self.started = time.perf_counter()
        self.process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
        while True:
            try:
                self.ask("GET", "/")
                break
            except OSError:
                assert self.process.poll() is None
                time.sleep(0.02)
        self.up_s = time.perf_counter() - self.started

    def ask(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def memory_mb(self):
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) / 1024

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0
