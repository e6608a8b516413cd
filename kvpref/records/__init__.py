"""What the rooms hand one another: groups, requests and outputs."""
