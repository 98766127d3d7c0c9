"""AdamW with an EWC penalty inside its step."""
