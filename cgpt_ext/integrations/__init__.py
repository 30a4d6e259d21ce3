"""One file per framework that these kernels plug into; each imports its framework, and only when it is asked for."""
