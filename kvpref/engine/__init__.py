"""Passes, schedules and their options: what combines plans, operators, models and losses."""
