"""Translation with recurrent encoders and decoders, on Multi30k or on any parallel text."""
