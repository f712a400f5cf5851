"""The command line: parse, call, print. Nothing is computed here.

`app.py` has the commands, `inference.py` those that run a model, `console.py` progress and errors.
"""
