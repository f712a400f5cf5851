"""What is decided before a weight is read: for every tensor of a checkpoint whether it is quantized (with which scheme and
method), kept in float or dropped; the exact size of the result, the memory it takes, and every refusal.

Imports everything above it, and starts nothing.
"""
