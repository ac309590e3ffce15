"""What is trained: finding, checking and loading a pretrained model, choosing its trainable weights, exporting it.

`source` reads facts without torch; `load` builds the network; `trainable` and `lora` choose the weights; `export`
writes the result and `reload` opens it. Import the modules themselves: this file stays light.
"""
