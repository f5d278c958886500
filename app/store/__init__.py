"""Store: model versions on disk, found, verified, loaded and watched; and the choice of a variant among them."""
