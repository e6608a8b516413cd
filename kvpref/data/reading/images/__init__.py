"""Images of prompts: from what rows hold to records that read their pixels when a batch is collated."""
