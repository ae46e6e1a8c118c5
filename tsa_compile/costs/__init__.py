"""What a prefill costs, dense and sparse, and how much memory it takes: one model of time for the compiler and for users.

devices.py      measured rates of devices, and those of others scaled from them
calls.py        FLOPs, bytes and milliseconds of one attention call and of the rest of a layer
breakeven.py    how much a budget keeps, and from which length on a call is compressed
models.py       what a transformers configuration is made of
predict.py      a whole prefill, layer by layer
expected.py     the expected times of a report's calls
memory.py       how much memory a model and its prefill need, and how much there is

Nothing here needs a pass: `passes/plan.py` and engines ask breakeven.py which calls are long enough.
"""
