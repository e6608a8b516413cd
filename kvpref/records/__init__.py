"""The records that packages pass to one another: groups, requests and outputs."""
