"""Split-and-Privatize: a customer keeps the text, a vendor keeps the model, and only privatized numbers pass between.

The vendor gives the customer the bottom of a model (the embeddings, and perhaps some blocks), frozen. The customer runs
it on the text, privatizes what comes out, and sends that once. The vendor trains the rest of the model on it. After
Shen et al., arXiv 2312.15603.
"""
