//! Training of MED: losses, optimiser, steps.
