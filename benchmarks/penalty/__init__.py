"""A penalty's value and gradient: this library, peers, and the operators alone, against the memory's bandwidth."""
