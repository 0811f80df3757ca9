"""A pretrained language model of 135 million parameters that teaches itself word problems on a laptop."""
