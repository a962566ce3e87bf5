"""Where labels come from: label store, simulated labeller, AI labeller, labelling page."""
