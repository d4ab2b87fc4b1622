"""What a model does, measured: what outputs read, what memories hold."""
