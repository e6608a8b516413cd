"""Operators: functions of tensors that know nothing of models or losses."""
