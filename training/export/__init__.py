"""Export: one graph per policy and rate, verified against eager, published with a manifest."""
