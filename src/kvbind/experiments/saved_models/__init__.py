"""What is done with a saved model of any family: opened, probed, simplified, drawn."""
