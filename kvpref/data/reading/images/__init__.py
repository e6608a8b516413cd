"""Images of prompts: from the values in rows to records that read their pixels when a batch is collated."""
