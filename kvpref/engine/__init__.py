"""Passes, schedules and their options: the room that combines the ones below."""
