"""Models with Token Sparse Attention, taken out of Python.

from tsa_compile.export import aoti, export_program, onnx, tensorrt

program = export_program(model, {"input_ids": ids}, config, dynamic_lengths=(1024, 131072))
aoti.save(program, "model.pt2")
onnx.save(program, "model.onnx")
"""

from tsa_compile.export import aoti, onnx, tensorrt
from tsa_compile.export.program import export_program

__all__ = ["aoti", "export_program", "onnx", "tensorrt"]
