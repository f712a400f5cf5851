"""Serve a model over HTTP as OpenAI's API words it; several clients share each reading of the weights.

Imports: errors, numerics, inference; starlette, uvicorn, prometheus-client and llguidance (pip install "bitwright[serve]").
"""
