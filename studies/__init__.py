"""Does upcycling pay? The paper's curves and sweeps, on two CPU cores."""
