"""The command line: one module per command or group of commands, put together in `lusifer.cli.app`.

A command checks its options, silences the libraries beneath (`lusifer.quiet`) and calls the part that does the work;
what is heavy is imported inside it, so that ``lusifer --help`` stays fast.
"""
