"""The Open Inference Protocol v2 over HTTP, binary tensors included: `tritonclient` and KServe clients, unchanged."""
