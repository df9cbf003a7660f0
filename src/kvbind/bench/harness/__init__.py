"""How anything is measured: operands, time and memory, processes, kernels on and off, limits of a device, records."""
