"""Export: one graph per policy and rate, verified against eager PyTorch, published with a manifest."""
