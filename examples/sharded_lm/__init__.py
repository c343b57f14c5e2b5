"""A small language model, trained with dropout and weight decay on a mesh of devices."""
