"""The GPT: its shape (no torch), the published sizes, its parts and how they are initialised."""
