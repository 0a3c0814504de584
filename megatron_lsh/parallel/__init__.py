"""The initializer: process groups and meshes, tensor parallel layers, collectives with gradients, data parallelism."""
