"""The subcommands of `tsa-compile`, one a file, thin over the library."""
