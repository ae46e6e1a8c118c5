"""The subcommands of `tsa-compile`, one a file, thin over the library.

options.py      what they take, and how options become a model and a TSAConfig
texts.py        the short texts that options are written in: 32K, keep:0.5, 15-30,31
loading.py      a model folder or a shape as a transformers model that fits into memory
output.py       stdout is the result; progress and notes go to stderr
errors.py       an error is one line on stderr and an exit code
"""
