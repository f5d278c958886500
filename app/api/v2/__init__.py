"""The Open Inference Protocol v2 over HTTP, with binary tensors, for `tritonclient` and KServe clients."""
