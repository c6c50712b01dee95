"""`sftstream ...`: looking at what a stream does, without training."""
