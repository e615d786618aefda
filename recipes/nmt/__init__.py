"""Translation with recurrent encoders and decoders, and attention.

Data: Multi30k, any parallel text, or generated number words.
"""
