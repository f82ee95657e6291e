"""HTTP: middleware, routes, replies, and the request and response objects (`server.http.protocol`)."""
