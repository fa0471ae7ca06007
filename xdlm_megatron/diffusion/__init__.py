"""XDLM in code: noise, loss, posterior and sampler. torch only; docs/maths.md derives what is computed
here.
"""
