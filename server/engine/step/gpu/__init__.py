"""Steps on a GPU: tables on the device, captured steps, and sampling on the device."""
