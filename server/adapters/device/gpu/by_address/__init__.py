"""What lies in memory of each adapter's own, where kernels of the gpu path find it by address."""
