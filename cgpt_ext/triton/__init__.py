"""Kernels in Triton, one file an op, imported when one is asked for: `import cgpt_ext` does not need Triton."""
