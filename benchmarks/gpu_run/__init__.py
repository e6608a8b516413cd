"""The GPU run: stages, each in a process of its own, whose rows are kept one by one."""
