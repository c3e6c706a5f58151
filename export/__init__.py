"""Export: a trained run becomes one ONNX graph with proof of parity, in an encoder bundle."""
