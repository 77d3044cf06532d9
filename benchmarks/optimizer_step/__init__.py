"""Cost of one optimizer step on the matrices of the paper's models, SinkGD beside its alternatives."""
