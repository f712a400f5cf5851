"""Modules that compute on quantized weights."""
