"""The drop-in switch: any padded batch, its rows' shared prefixes computed once, behind the model's own forward."""

from kvpref.integrations.shared_prefix.switch import SharedPrefix, SharedPrefixStats, shared_prefix

__all__ = ["SharedPrefix", "SharedPrefixStats", "shared_prefix"]
