"""The published audit of three models (arXiv 2606.10703): its figures, its configurations' facts, and a comparison.

Nothing here takes part in an audit. The figures are what others measured; ``compare`` lays ours beside them;
``released_code`` computes the four metrics as the released code did, where that differs from their definition.
"""
