"""What `explain` tells of an inner loop: whether forms fit, its operands in words, and what it costs."""
