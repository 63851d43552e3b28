"""Back ends: how a process holds a model that is too large for one device, or shares it with others."""
