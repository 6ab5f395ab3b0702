"""What the `snapgen` commands do, one file each; `snapgen_core.cli` reads their arguments.

A command takes the parsed arguments and returns the exit code. Heavy imports stay inside functions.
"""
