"""Likelihood against generation: the models of a sweep measured by one protocol, compared with intervals."""
