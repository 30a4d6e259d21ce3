"""Many small runs that answer one question: sweeps, ablations, coordinate checks."""
