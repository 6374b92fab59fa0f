"""The gpu path: tables of slots for Triton kernels, and the copies that fill them."""
