"""`mmm-export bench`: prefill and decode of a session timed apart, with memory, energy and the roofline beside them."""
