"""Models with Token Sparse Attention, taken out of Python.

from tsa_compile.export import export_program, aoti

program = export_program(model, {"input_ids": ids}, config, dynamic_lengths=(1024, 131072))
aoti.save(program, "model.pt2")
"""

from tsa_compile.export import aoti
from tsa_compile.export.program import export_program

__all__ = ["aoti", "export_program"]
