"""HTTP: routes, documents, and the boundary where errors become answers."""
