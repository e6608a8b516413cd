"""Measuring on this machine: times with their spread, compared with what the FLOPs allow.

Needs only the engine, not `kvpref.data` or `kvpref.training`, so it runs without `datasets` installed.
"""
