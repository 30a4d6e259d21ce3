"""Token files of other trainers, read and written: one file a format, and the table of them all."""
