"""From names of files and datasets to raw rows."""
