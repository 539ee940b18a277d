"""What all ops stand on: registration, gradients, arguments, backends, sharding, precision."""
