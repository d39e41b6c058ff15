"""From batches to new weights: the module, its optimization, what the PRM learns from, the warm start."""
