"""What a mask means: the recorded operators that build it, read into a statement about positions.

symbolic.py      what an element of a tensor is at a symbolic position; its rules are in the other symbolic_*.py
predicate.py     the statements: propositional formulas over atoms such as kv <= q
infer.py         the pass: of each call's mask the statement, and what kind of mask it makes
info.py          `MaskInfo`, which the other passes read
"""
