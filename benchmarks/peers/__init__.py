"""Other ways to train on preference pairs, each behind the interface of `peers.interface`, and kvpref beside them.

To add one: a file with a `Peer`, and a line here.
"""

from __future__ import annotations

from peers.flex_attention import FlexAttentionPeer
from peers.interface import Peer
from peers.prefix_grouper import PrefixGrouperPeer
from peers.trl_dpo import TRL_SETTINGS, TrlPeer

PEERS: dict[str, tuple[Peer, ...]] = {
    "trl": tuple(TrlPeer(setting) for setting in TRL_SETTINGS),
    "prefix_grouper": (PrefixGrouperPeer(),),
    "flex_attention": (FlexAttentionPeer(),),
}
"""By the name on the command line; a peer with several settings is there once for each."""
