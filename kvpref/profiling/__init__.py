"""Measuring on this machine: times with their spread, beside what the FLOPs allow.

Needs the engine only: neither `kvpref.data` nor `kvpref.training`, so it runs where `datasets` is not installed.
"""
