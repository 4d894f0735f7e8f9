"""HTTP in front of the engine: what server.py puts together.

Read routes.py for what the server answers, then served_model.py for how a request becomes prompts
and sampling parameters, then worker.py for its way to the engine and back, then answers.py.
gate.py stands in front of the routes, protocol.py has the types of requests and answers.
"""
