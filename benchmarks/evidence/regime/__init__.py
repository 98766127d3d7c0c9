"""The rank-1 paper's regime: a constant rate, training until more of it no longer helps, penalties in the gradient.

A regime compares methods in several settings, such as another learning rate or an average of the weights, where the
other experiments have one setting. It tests six predictions that were written down before its final runs.
"""
