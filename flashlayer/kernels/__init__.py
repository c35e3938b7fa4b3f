"""The Triton kernels: forward, delta, dK/dV, dQ, and the table of their tile sizes.

They import Triton and ``math`` alone; :mod:`flashlayer.backends.triton` launches them.
"""
