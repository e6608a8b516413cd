"""`python -m kvpref` is `kvpref`."""

from kvpref.cli import main

if __name__ == "__main__":
    main()
