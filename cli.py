"""Launcher for a checkout: `python cli.py ...` is `kvpref ...`."""

from kvpref.cli import main

if __name__ == "__main__":
    main()
