"""What a prefill costs, dense and sparse, and how much memory it takes: one model of time for the compiler and for users.

Nothing here needs a pass: `passes/plan.py` and engines ask breakeven.py which calls are long enough.
"""
