"""The command line: parse and print; one file per command; heavy imports inside commands."""

from kvpref.cli.app import main

__all__ = ["main"]
