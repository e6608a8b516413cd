"""Trajectories of agents over many turns, as whole conversations or one row per model call, to groups of tokens."""
