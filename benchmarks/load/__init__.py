"""Load: clients, and the requests and images that they send."""
