"""From a pipeline to a phone: the graph in its shape, Core ML packages, and proof without a Mac that they compute the same."""
