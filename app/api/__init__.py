"""HTTP: routes, schemas, and the middleware around them."""
