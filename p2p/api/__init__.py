"""The HTTP API (DESIGN §4): one file per noun. Decides how things are asked and told; what is done is
`coordination.operations` and `coordination.dispatcher`.

`app` assembles; `security` decides who may ask; `bodies` reads requests; `errors` tells failures; `context` is what
the handlers share.
"""
