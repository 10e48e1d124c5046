"""Training: one compiled step, a loop around it, and runs that resume after a kill."""
