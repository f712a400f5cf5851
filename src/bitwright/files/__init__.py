"""Safetensors shards on disk: headers checked before they are believed, tensors read one by one, files written atomically.

Imports: errors, system.
"""
