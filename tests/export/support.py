"""What the tests of the exports share."""

from tsa_compile import TSAConfig

SMALL = TSAConfig(window=4, min_tokens=3, layers=(1,), floor=None)
# Code for a test to run a few times is not worth optimising: g++ takes a third less time for the whole of it.
# Nor is its vectorisation, by which Inductor compiles each loop twice over; what it computes is the same.
QUICK = {"aot_inductor.debug_compile": True, "cpp.simdlen": 1}
