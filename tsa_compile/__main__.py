"""`python -m tsa_compile`: the command `tsa-compile`."""

from tsa_compile.cli import main

if __name__ == "__main__":
    main()
