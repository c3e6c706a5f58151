"""Substitute for Triton's onnxruntime backend on a machine without it: a Python backend.

It works on the CPU, or with CUDA if HISTOSEEK_STAND_IN_ON is ``cuda``.

Like the real backend, it refuses to load a configuration if its names, shapes or types differ from the
graph's. Model parameters make it slow (``test_delay_s``) or make it fail at a black tile (``test_fail``).
"""

import ctypes
import json
import os
import time

import numpy as np
import onnxruntime
import triton_python_backend_utils as backend

TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(int64)": "TYPE_INT64",
}
USED = ctypes.c_char_p(b"used_dltensor")  # must outlive the capsules
rename = ctypes.pythonapi.PyCapsule_SetName
rename.argtypes, rename.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_int


def to_tensor(name, array):
    """Wrap an array; the backend's own wrapping sends 0 bytes under NumPy 2, DLPack does not."""
    capsule = np.ascontiguousarray(array).__dlpack__()
    tensor = backend.Tensor.from_dlpack(name, capsule)
    rename(capsule, USED)  # the name that NumPy's deleter expects of a capsule that was consumed
    return tensor


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        graph = config.get("default_model_filename") or "model.onnx"
        path = os.path.join(args["model_repository"], args["model_version"], graph)
        given = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = int(given.get("intra_op_thread_count", "0"))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider = "CPUExecutionProvider"
        if os.environ.get("HISTOSEEK_STAND_IN_ON") == "cuda":
            provider = "CUDAExecutionProvider"
            onnxruntime.preload_dlls()
        self.session = onnxruntime.InferenceSession(path, options, providers=[provider])
        if self.session.get_providers()[0] != provider:
            raise ValueError(f"ONNX Runtime used {self.session.get_providers()[0]}")
        self.delay_s = float(given.get("test_delay_s", "0"))
        self.fail = given.get("test_fail", "")
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.batched = config.get("max_batch_size", 0) > 0
        self._check(config["input"], self.session.get_inputs())
        self._check(config["output"], self.session.get_outputs())

    def _check(self, configured, real):
        real = {tensor.name: tensor for tensor in real}
        for tensor in configured:
            name = tensor["name"]
            if name not in real:
                raise ValueError(f"unexpected inference tensor {name!r}, model has {sorted(real)}")
            dims = ([-1] if self.batched else []) + [int(d) for d in tensor["dims"]]
            shape = [d if isinstance(d, int) else -1 for d in real[name].shape]
            same = len(shape) == len(dims) and all(
                a == b or -1 in (a, b) for a, b in zip(dims, shape, strict=True)
            )
            if not same or (self.batched and shape[0] != -1):
                raise ValueError(f"tensor {name!r}: model {shape} does not match config {dims}")
            if TYPES.get(real[name].type) != tensor["data_type"]:
                raise ValueError(f"tensor {name!r}: model type {real[name].type} does not match")

    def execute(self, requests):
        if self.delay_s:
            time.sleep(self.delay_s)
        feeds = [
            {
                name: np.from_dlpack(backend.get_input_tensor_by_name(request, name))
                for name in self.inputs
            }
            for request in requests
        ]
        if self.fail and any((feed[self.inputs[0]] == 0).all() for feed in feeds):
            error = backend.TritonError(self.fail)
            return [backend.InferenceResponse(error=error) for _ in requests]
        joined = feeds[0]
        if len(feeds) > 1:
            joined = {name: np.concatenate([f[name] for f in feeds]) for name in self.inputs}
        made = self.session.run(self.outputs, joined)
        answers, start = [], 0
        for feed in feeds:
            stop = start + len(feed[self.inputs[0]])
            answers.append(
                backend.InferenceResponse(
                    [to_tensor(n, m[start:stop]) for n, m in zip(self.outputs, made, strict=True)]
                )
            )
            start = stop
        return answers
