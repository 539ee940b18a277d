"""What all ops stand on: declaring and applying them, gradients, arguments, backends, sharding."""
