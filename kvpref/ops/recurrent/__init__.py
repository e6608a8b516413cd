"""Layers that carry a state from token to token, over segments of a prefix tree."""

from kvpref.ops.recurrent.convolution import segment_convolution
from kvpref.ops.recurrent.lightning import decayed_attention
from kvpref.ops.recurrent.rows import Scan, SegmentRows
from kvpref.ops.recurrent.selective import selective_scan

__all__ = ["Scan", "SegmentRows", "decayed_attention", "segment_convolution", "selective_scan"]
