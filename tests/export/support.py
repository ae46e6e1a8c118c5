"""What the tests of the exports share."""

from tsa_compile import TSAConfig

SMALL = TSAConfig(window=4, min_tokens=3, layers=(1,), floor=None)
# Code for a test to run a few times is not worth optimising.
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0"}
