"""For custom training loops: padded rows in, log-probs and entropies of their shape out."""

from kvpref.integrations.agent_loops.logps import TreeLogps, tree_forward_backward, tree_logps

__all__ = ["TreeLogps", "tree_forward_backward", "tree_logps"]
