"""HTTP: middleware, replies, routes and the shapes of the wire."""
