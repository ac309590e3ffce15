"""HOW the clipped sum is obtained. One type out, `ClippedSum`; `engine.attach` is the way in."""
