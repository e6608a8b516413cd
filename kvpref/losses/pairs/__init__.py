"""Objectives on pairs: a chosen and a rejected response to one prompt."""
