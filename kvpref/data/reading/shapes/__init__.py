"""The shapes of rows of preference data, each with a small converter to the responses of a prompt."""
