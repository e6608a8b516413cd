"""Peak memory predicted from a configuration, without memory for the model."""
