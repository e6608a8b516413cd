"""Cascade attention: causal self attention merged with attention to shared prefixes, with exact gradients."""

from kvpref.ops.attention.backends import available_backends, get_backend, select_backend
from kvpref.ops.attention.block import AttentionParams, VarlenBlock
from kvpref.ops.attention.cascade import CascadePlan, cascade_attention

__all__ = [
    "AttentionParams",
    "CascadePlan",
    "VarlenBlock",
    "available_backends",
    "cascade_attention",
    "get_backend",
    "select_backend",
]
