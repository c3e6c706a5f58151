"""Export: turn a trained run into an encoder bundle with one ONNX graph and a proof of parity."""
