"""The integer record outside Python: ``c`` (C99), ``onnx``, ``fpga``, and ``edge_cloud``, a network cut in two."""
