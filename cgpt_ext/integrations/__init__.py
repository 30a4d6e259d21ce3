"""One file per framework; nothing here is imported until it is asked for."""
