"""From a request body to the response objects: body -> jobs -> text -> objects. HTTP itself is `server.http`."""
