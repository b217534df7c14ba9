"""The network: backbone protocol, message-passing layers, readouts and target scalers."""
