"""Export: freeze hard merging into one graph per reduction rate, prove each against eager, publish with a manifest."""
