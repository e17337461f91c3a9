"""The HTTP interface: what the engine does, as resources for control planes, people and Prometheus.

    server     sockets and connections: unix, TCP, TLS, and what a slow or silent client is allowed
    app        one middleware around everything: request id, who asks, the error answers
    auth       peer credentials of the unix socket, bearer tokens on TCP
    table      one route: method, path, models, answers; it checks and calls
    routes*    the calls themselves, one function each; the only list of routes there is
    bodies     bytes of a request to a checked model, or every violation at once
    events     server-sent events
    problems   error class -> status, and the problem details (RFC 9457)
    models*    the wire models; the only place where seconds become milliseconds
    openapi    the document, generated from the route table and the models

A request runs: connection (head in time) > middleware (id, identity) > table (path, query, headers,
body: all violations together) > one function > bytes. Nothing here decides anything about a guest.
"""
